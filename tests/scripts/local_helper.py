"""Something the script beside it imports."""

FORWARD_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
