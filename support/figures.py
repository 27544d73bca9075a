"""What all figures have in common: colors, and files that are whole.

Scripts draw on a Figure and not with pyplot, which would need a screen or a plotting backend.
"""

import io
import os
from pathlib import Path

from support.runs import warn, write_whole

# A notebook sets this variable to a plotting backend of its own. If the backend is not installed
# here, importing matplotlib fails. We only write files, and need no backend.
backend = os.environ.pop("MPLBACKEND", None)
import matplotlib
from matplotlib.figure import Figure  # The scripts take it from here.

if backend is not None:
    os.environ["MPLBACKEND"] = backend

POWER_LAW, UNIFORM = "#d1495b", "#30638e"  # the colors of the two priors
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")  # fonts that come with matplotlib


def write_figure(path, plot, *content):
    """Write the figure plot(*content). If this is not possible, there is a warning: it can wait."""
    picture = io.BytesIO()
    try:
        plot(*content).savefig(picture, format="png", dpi=120)
        write_whole(path, lambda temporary: temporary.write_bytes(picture.getvalue()))
    except Exception as error:  # For example, a matplotlibrc asks for LaTeX, and there is none.
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        warn(f"warning: cannot draw {path.name}: {reason}")
