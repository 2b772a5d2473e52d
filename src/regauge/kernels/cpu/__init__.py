"""C++ kernels for a CPU, opened with ctypes; `regauge.kernels.reference` defines what they compute."""
