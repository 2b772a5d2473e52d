"""What a training and its dry run refuse of a recipe and a model, before any work."""

from __future__ import annotations

from regauge.anatomy.model import Anatomy
from regauge.elastic.family import Family
from regauge.engine.dividing import anatomy_for
from regauge.engine.gating import refuse_gates
from regauge.engine.routing import refuse_route
from regauge.engine.training_classes import UNLIKE, classifies, refuse_moved
from regauge.engine.training_recipe import Asked, refuse_shard
from regauge.errors import RecipeError
from regauge.hosts.base import Source
from regauge.learn.distillers import OF_LOGITS
from regauge.learn.training import PLUS, Training
from regauge.plan import Plan


def fitting(plan: Plan, training: Training, source: Source, asked: Asked) -> Anatomy:
    """The anatomy that the family will have, of a model that can be trained so.

    Raises:
        RegaugeError: it cannot, in a sentence.
    """
    scales, seen, family = source.anatomy.plumbing.scales, classifies(source), plan.family or Family()
    names = training.distiller.split(PLUS)
    if not (source.anatomy.causal or scales or seen) and any(name in OF_LOGITS for name in names):
        raise RecipeError(f"recipe {plan.name!r} trains on next tokens, and {source.anatomy.family} gives none.")
    if seen and any(name not in OF_LOGITS for name in names):
        raise RecipeError(UNLIKE.format(plan.name, training.distiller, source.anatomy.family))
    anatomy = anatomy_for(training, family, source)
    for refuse in (refuse_route, refuse_gates, refuse_moved):
        refuse(training, family, anatomy)
    refuse_shard(training, bool(scales) or seen, asked)
    return anatomy
