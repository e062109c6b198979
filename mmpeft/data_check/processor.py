"""The processor that training would use, without the weights of any model."""

from mmpeft import checkpoint


def processor_of(recipe=None, overrides: list[str] = (), run=None):
    """The :class:`~mmpeft.processing.BridgeProcessor` of a recipe, or of a run or checkpoint.

    ``None`` if neither is given.

    Raises:
        ValueError: both are given, or the recipe is bad.
        FileNotFoundError: there is no such recipe or run.
    """
    from mmpeft.processing import BridgeProcessor

    if recipe is not None and run is not None:
        raise ValueError("give --recipe or --run, not both.")
    if run is not None:
        return BridgeProcessor.from_pretrained(checkpoint.find_checkpoint(run))
    if recipe is None:
        return None
    from mmpeft.config import load
    from mmpeft.plan import build_empty, own_parts

    config, _ = load(recipe, overrides)
    parts, limit = config.model, config.data.max_length
    whole = own_parts(parts)
    model = build_empty(whole)
    model.config.language_model = {"name": whole.language_model, "revision": whole.revision}
    processor = BridgeProcessor.from_model(model, limit, parts.chat_template)
    if parts.start_from is not None and parts.chat_template is None:  # goes on as it was taught
        limit = processor.max_length
        processor = BridgeProcessor.from_pretrained(checkpoint.find_checkpoint(parts.start_from))
        processor.max_length = limit
    return processor
