"""A planned step and the requests that its results belong to."""

from __future__ import annotations

from dataclasses import dataclass

from ..step import Int32, Int64, StepPlan
from .request import Request


@dataclass(slots=True)
class ScheduledStep:
    """A plan with the requests that its results belong to. A row may have another request when results arrive: they are
    matched by request, or by the row's admission number."""

    plan: StepPlan
    sampled: list[Request | None]  # parallel to plan.samples; None: the token is dropped
    rows: Int32  # [S] the row of each sample's request, when the step was planned
    admissions: Int64  # [S] its admission number: see `Rows.order`
    positions: Int32  # [S] the position in its request that the sampled token gets
    prompt_logprobs: dict[int, Request]  # by index into the plan's requests
    finishing: list[Request]  # finish with this step without a sample (max_tokens=0)
    prompt_tokens: int  # of the step's query tokens, those of prompts
