"""Makes the toy adapters importable by name: a spec's factory is ``"module:Class"``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
