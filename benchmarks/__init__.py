"""Speed and memory, measured: training, sampling, resampling."""
