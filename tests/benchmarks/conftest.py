import sys
from pathlib import Path

# `python -m benchmarks.gpu_check` finds the folder by the working directory; pytest may be started from anywhere.
sys.path.insert(0, str(Path(__file__).parents[2]))
