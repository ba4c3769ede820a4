"""The policy and the reference as torch modules: loading them, and the log-probs of completions."""

import logging

# PEFT imports it where it is installed, and it then tells everyone which kernels it lacks, quantized model or not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
