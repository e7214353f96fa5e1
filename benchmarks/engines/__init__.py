"""One module for each way to train that is measured; `run(job)` trains and tells what it took."""
