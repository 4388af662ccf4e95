"""Where curves go beside the run's own files: nowhere unless asked."""

from dataclasses import dataclass


@dataclass
class TrackingConfig:
    """wandb and TensorBoard, of the LLM's training and of the side processes."""

    wandb: str = "off"  # off | offline (RUN/tracking, for `wandb sync`) | online
    project: str = "megatron-bliss"  # of wandb; a run is a group in it
    entity: str | None = None  # of wandb
    tensorboard: bool = False  # RUN/tensorboard

    @property
    def is_on(self) -> bool:
        return self.tensorboard or self.wandb != "off"
