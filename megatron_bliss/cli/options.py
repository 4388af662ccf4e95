"""Words that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

RunOption = Annotated[Path, typer.Option("--run", help="Directory of the run.")]
RoundOption = Annotated[int, typer.Option("--round", min=1, help="Number of the round, from 1.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
