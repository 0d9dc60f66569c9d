import sys
from pathlib import Path

# golden.py is one folder up
sys.path.append(str(Path(__file__).parents[1]))
