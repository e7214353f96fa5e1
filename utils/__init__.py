"""The rooms that `train.py`, `inference.py` and the generators are built from."""

import logging

# It says when it is imported, which PEFT does, that it lacks an optional package, and on every call
# that it casts inputs to float16, as it always does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
