"""What came out of a run, in plain sentences, good or bad."""

from typing import Any

_NOTABLE = 0.005  # nats; differences below it are called none


def summary(result: dict[str, Any]) -> list[str]:
    """What came out, in plain sentences, good or bad."""
    main = result["main_arm"]
    arms = result["arms"]
    ours = arms.get(main, {}).get("test_loss")
    if ours is None:
        return [f"The arm {main} has no loss yet at the step where all arms can be compared."]
    sentences = [
        f"After {result['iteration']} steps, warm-up included, the LLM trained on what {main} selected has a loss of "
        f"{ours:.3f} ({result['measure']} of the learning rate)."
    ]
    random = next((name for name, arm in arms.items() if arm["method"] == "random" and name != main), None)
    for name, arm in arms.items():
        if name != main and arm["test_loss"] is not None:
            sentences.append(_comparison(main, ours, name, arm["test_loss"], is_random=name == random))
    if (gain := result["speedup_over_random"]) is not None:
        sentences.append(_speedup_sentence(main, gain, result["speedup_is_lower_bound"]))
    spent, training = arms[main]["selection_flops"], arms[main]["train_flops"]
    if spent:
        sentences.append(
            f"Selecting took {spent / training:.0%} of the floating-point operations of the training itself."
        )
    if result["auc_target_domain"] is not None:
        sentences.append(
            f"The scores rank a sequence of the domain {result['target_domain']} above another one with probability "
            f"{result['auc_target_domain']:.2f} (0.5 would be chance)."
        )
    return sentences


def _comparison(main: str, ours: float, name: str, theirs: float, is_random: bool) -> str:
    difference = theirs - ours
    if difference >= _NOTABLE:
        return f"{name} is at {theirs:.3f}, which is {difference:.3f} worse."
    verdict = "no different" if difference > -_NOTABLE else f"{-difference:.3f} better"
    if is_random:
        return f"{name} is at {theirs:.3f}, {verdict}: the selection by {main} did not help here."
    return f"{name} is at {theirs:.3f}, {verdict}: a simpler rule does as well here as {main}."


def _speedup_sentence(main: str, gain: float, is_lower_bound: bool) -> str:
    if is_lower_bound:
        return f"Random data had not reached that loss after {gain:.1f} times the steps of {main} since the warm-up."
    if gain <= 1:
        return f"Random data reached that loss in {gain:.1f} times the steps: {main} was not faster."
    return f"Random data needed {gain:.1f} times the steps of {main} since the warm-up to reach that loss."
