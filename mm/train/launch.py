"""The command line that every stage script and `mm train STAGE` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mm.train.config import default_path, load_config


def main(stage: str, argv: Sequence[str] | None = None) -> None:
    """Trains a stage.

    Args:
        stage: a name in `mm.stages.STAGES`.
        argv: `[--config X.yaml] key.sub=value ...`; the process's own arguments when None.
    """
    parser = argparse.ArgumentParser(
        prog=f"mm train {stage}", description=f"Trains stage {stage}; see docs/training.md."
    )
    parser.add_argument(
        "--config", type=Path, default=default_path(stage), help="YAML file (default: the small one that ships)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="overrides, such as optim.steps=100")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if config.stage != stage:
            raise ValueError(f"config {arguments.config} is for stage {config.stage}, not {stage}")
        import torch  # slow to import, as is the trainer; a mistake in the configuration shows at once

        from mm.train.trainer import Trainer, TrainingError

        # Dying activations leave denormal numbers, with which CPUs are many times slower. Threads inherit this, so it comes first.
        torch.set_flush_denormal(True)
        try:
            export = Trainer(config).train()
        except TrainingError as error:
            sys.exit(f"stopped: {error}")
    except ValueError as error:
        parser.error(str(error))
    print(
        f"exported {export}"
        if export
        else f"stopped; the same command goes on from the last checkpoint in {config.output}"
    )
