"""``python -m cbsa_torch.cli`` is ``cbsa``."""

import sys

from cbsa_torch.cli import main

sys.exit(main())
