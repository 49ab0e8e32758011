"""What this model has in common with the demo model is in that folder: model, packed questions, augmentation, optimiser."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1] / "demo_model"))
