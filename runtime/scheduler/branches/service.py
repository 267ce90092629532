"""Branch operations: checked, put in order per branch, and turned into engine requests.

Runs on the scheduler's thread. An operation on a branch whose end is not known yet (it has just generated, or its last
text is being tokenized) is queued here until it is. Every operation is answered exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from ...config import EngineConfig
from ...errors import InvalidRequest
from ...limits import check_token_ids, fit
from ...messages import BranchOp, BranchRun, ControlReply, Piece, Refusal, Settled
from ...sampling_params import SamplingParams
from ...shared_tokens import EMPTY, SharedTokens, tokens_from_bytes, tokens_to_bytes
from ...step import Int32
from ..request import Request
from ..scheduler import Scheduler
from .registry import Branches, BranchRecord, BranchState

Message = BranchOp | BranchRun
_UNSETTLED = (BranchState.SETTLING, BranchState.ENCODING)


class BranchService:
    """The owner of the core delivers ``replies`` and ``to_encode``, and clears them, after each message and step.

    ``encode`` tokenizes a message in place (in process). Without it, messages to tokenize are appended to ``to_encode``
    and must come back through `take` with ``again`` set.
    """

    def __init__(self, scheduler: Scheduler, config: EngineConfig) -> None:
        self._scheduler = scheduler
        self._clock = scheduler.clock
        self.registry = Branches(
            scheduler.tree,
            max_branches=config.max_branches,
            max_per_key=config.max_branches_per_key,
            ttl=config.branch_ttl,
            now=scheduler.clock,
            instance=config.instance,
        )
        scheduler.ledger.hold_owner = self.registry
        self.encode: Callable[[Message], None] | None = None
        self.replies: list[ControlReply] = []
        self.waiters: dict[int, Callable[[ControlReply], None]] = {}  # in process: by operation id
        self.to_encode: list[Message] = []
        self._running: dict[int, BranchRecord] = {}  # by engine request, those in the scheduler
        self._outputs: dict[int, tuple[BranchRecord, Int32]] = {}  # of requests that ended before they were settled
        self._settled: dict[int, Settled] = {}  # of requests that were settled before they ended
        self._waiting: dict[BranchRecord, list[Message]] = {}  # operations queued until the branch's end is known
        self._unsubmitted: dict[int, bool] = {}  # engine request -> whether its client has left

    # -- input ---------------------------------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        """Takes one operation, from the tokenizer or a caller in process. An invalid one is answered with its error."""
        self._clock.tick()
        if isinstance(message, BranchRun) and not message.again:
            self._unsubmitted.update(dict.fromkeys(message.ids, False))
        self._dispatch(message)

    def settled(self, message: Settled) -> None:
        """Where the returned text of a request on a branch ends."""
        self._clock.tick()
        ended = self._outputs.pop(message.id, None)
        if ended is not None:
            self._settle(*ended, message)
        elif message.id in self._running:
            self._settled[message.id] = message

    def abort(self, request_id: int) -> None:
        """A client has left, perhaps before its request was submitted to the scheduler."""
        if request_id in self._unsubmitted:
            self._unsubmitted[request_id] = True

    # -- order ---------------------------------------------------------------------------------------------------------

    def _dispatch(self, message: Message) -> None:
        branch: BranchRecord | None = None
        try:
            if message.branch:
                branch = self.registry.get(message.branch, message.namespace[0])
                if not self._ready(branch, message):
                    return
            if message.refusal is not None:
                raise message.refusal.error()
            if isinstance(message, BranchOp):
                value = self._operate(message, branch)
                self._reply(ControlReply(message.id, True, value))
            elif branch is None:
                raise InvalidRequest("branch", "must be named")
            else:
                self._run(message, branch)
        except InvalidRequest as error:
            self._refuse(message, error)
        if message.again and branch is not None:
            self._resume(branch)

    def _ready(self, branch: BranchRecord, message: Message) -> bool:
        """Whether to process the message now. If not, it is queued here or sent to the tokenizer."""
        if message.again:
            self._set_state(branch, BranchState.IDLE)
            return True
        kind = message.what if isinstance(message, BranchOp) else "generate"
        if kind == "delete":
            return True
        if branch.state in _UNSETTLED:
            self._waiting.setdefault(branch, []).append(message)
            return False
        if branch.state is BranchState.GENERATING and kind != "get":
            raise InvalidRequest(
                "branch",
                f"{branch.id} is generating: wait for its answer, fork it before it generates, or delete it",
                status=409,
            )
        if branch.rest and message.refusal is None and self._needs_all_tokens(message):
            self._put_before(branch.rest, message)
            if self.encode is None:
                self._set_state(branch, BranchState.ENCODING)
                self.to_encode.append(message)
                return False
            self.encode(message)
        return True

    def _needs_all_tokens(self, message: Message) -> bool:
        if isinstance(message, BranchRun):
            return True
        return message.what in ("extend", "create") and message.piece is not None and not message.piece.empty

    def _put_before(self, rest: str, message: Message) -> None:
        message.again = self.encode is None
        if isinstance(message, BranchRun) and message.continuations is not None:
            message.continuations = [msgspec.structs.replace(piece, before=rest) for piece in message.continuations]
        else:
            message.piece = msgspec.structs.replace(message.piece or Piece(), before=rest)

    def _resume(self, branch: BranchRecord) -> None:
        """The branch's end is known: processes its queued operations, in order."""
        for message in self._waiting.pop(branch, ()):
            self._dispatch(message)

    def _refuse(self, message: Message, error: InvalidRequest) -> None:
        if isinstance(message, BranchOp):
            self._reply(ControlReply(message.id, False, None, Refusal.of(error)))
            return
        for id in message.ids:
            if id in self._unsubmitted:  # the others have been submitted
                self._refuse_run(id, error)

    def _reply(self, reply: ControlReply) -> None:
        waiter = self.waiters.pop(reply.id, None)
        if waiter is None:
            self.replies.append(reply)
        else:
            waiter(reply)

    def _refuse_run(self, id: int, error: InvalidRequest) -> None:
        if self._unsubmitted.pop(id):
            self._scheduler.refuse_aborted(id)
        else:
            self._scheduler.refuse(id, error)

    # -- operations ----------------------------------------------------------------------------------------------------

    def _operate(self, op: BranchOp, branch: BranchRecord | None) -> Any:
        registry = self.registry
        if op.what == "create":
            return self._create(op, branch)
        if branch is None:
            raise InvalidRequest("branch", "must be named")
        if op.what == "fork":
            return {"ids": [child.id for child in registry.fork(branch, op.n)], **self._facts(branch)}
        if op.what == "extend":
            branch.tokens, branch.rest = self._extended(branch.tokens, op.piece), self._rest_after(branch, op.piece)
            return self._facts(branch)
        if op.what == "delete":
            self._delete(branch)
            return {"deleted": True}
        facts = {
            "id": branch.id,
            **self._facts(branch),
            "pending_text": branch.rest,
            "resident_tokens": registry.resident(branch),
            "held_tokens": 0 if branch.hold is None else branch.hold.tokens,
            "generating": branch.state is BranchState.GENERATING,
        }
        return facts | ({"tokens": tokens_to_bytes(branch.tokens.array())} if op.tokens else {})

    def _create(self, op: BranchOp, parent: BranchRecord | None) -> Any:
        if parent is None:
            branch = self.registry.create(op.namespace, self._extended(EMPTY, op.piece), op.ttl)
        else:
            tokens, rest = self._extended(parent.tokens, op.piece), self._rest_after(parent, op.piece)
            branch = self.registry.fork(parent, 1, op.ttl)[0]
            branch.tokens, branch.rest = tokens, rest
        return {"id": branch.id, **self._facts(branch)}

    def _facts(self, branch: BranchRecord) -> dict[str, Any]:
        return {"num_tokens": branch.tokens.length, "expires_in": branch.ttl}

    def _extended(self, tokens: SharedTokens, piece: Piece | None) -> SharedTokens:
        """The tokens followed by the piece's. Raises `InvalidRequest` if they exceed the limits."""
        if piece is None or piece.empty:
            return tokens
        more = tokens_from_bytes(piece.tokens if tokens.length or piece.first is None else piece.first)
        if len(more):
            limits = self._scheduler.limits
            fit(tokens.length + len(more), SamplingParams(max_tokens=0), limits, path="branch")
            check_token_ids(more, limits.vocab_size, "branch")
        return tokens.extended(more)

    def _rest_after(self, branch: BranchRecord, piece: Piece | None) -> str:
        """The text at the branch's end: none, once it was tokenized together with the piece."""
        return branch.rest if piece is None or piece.empty else ""

    def _delete(self, branch: BranchRecord) -> None:
        ids = [*branch.readers, *([branch.run] if branch.state is BranchState.GENERATING else [])]
        self._outputs.pop(branch.run, None)
        self.registry.remove(branch)
        for id in ids:
            self._scheduler.abort(id)
        self._resume(branch)  # they are answered with 410

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _run(self, run: BranchRun, branch: BranchRecord) -> None:
        if run.continuations is None:
            self._generate(run, branch)
        else:
            self._score(run, branch, run.continuations)
        self.registry.touch(branch)

    def _generate(self, run: BranchRun, branch: BranchRecord) -> None:
        tokens, rest = self._extended(branch.tokens, run.piece), self._rest_after(branch, run.piece)
        if not tokens.length:
            raise InvalidRequest("branch", f"{branch.id} is empty: extend it before it generates")
        params = fit(tokens.length, run.params, self._scheduler.limits, path="branch")
        # Nothing can fail from here on. What is appended stays, even if the client has left.
        branch.tokens, branch.rest = tokens, rest
        prompt = tokens.array()
        for i, id in enumerate(run.ids):  # the first sample is appended to the branch
            echo_from = 0 if run.echo_tokens else None
            self._submit(self._request(id, prompt, params.sample(i), run, branch, echo_from, settle=i == 0), branch)

    def _score(self, run: BranchRun, branch: BranchRecord, continuations: list[Piece]) -> None:
        if not branch.tokens.length:
            raise InvalidRequest("branch", f"{branch.id} is empty: a continuation has nothing to follow")
        limits = self._scheduler.limits
        opening = tokens_from_bytes(run.opening)
        trunk = branch.tokens.array()
        prompts: list[tuple[Int32, int]] = []  # with the position at which scoring begins
        alone: list[tuple[Int32, int]] = []
        for i, piece in enumerate(continuations):
            field, tokens = f"continuations[{i}]", tokens_from_bytes(piece.tokens)
            if len(tokens) == piece.left:
                raise InvalidRequest(field, "must not be empty")
            longest = max(len(trunk), len(opening)) + len(tokens)
            fit(longest, SamplingParams(max_tokens=0), limits, path=field, counted="tokens with its branch")
            check_token_ids(tokens, limits.vocab_size, field)
            prompts.append((np.concatenate((trunk, tokens)), len(trunk) + piece.left))
            alone.append((np.concatenate((opening, tokens[piece.left :])), len(opening)))
        for id, (prompt, start) in zip(run.ids, [*prompts, *(alone if run.unconditional else [])], strict=True):
            params = msgspec.structs.replace(run.params, prompt_logprob_start=start)
            self._submit(self._request(id, prompt, params, run, branch, start), branch)

    def _request(
        self,
        id: int,
        prompt: Int32,
        params: SamplingParams,
        run: BranchRun,
        branch: BranchRecord,
        echo_from: int | None,
        *,
        settle: bool = False,
    ) -> Request:
        return Request(
            id,
            prompt,
            params,
            namespace=branch.namespace,
            priority=run.priority,
            stream=run.stream,
            echo_from=echo_from,
            settle=settle,
            remembered=branch.remembered,
            on_end=self._ended,
        )

    def _submit(self, request: Request, branch: BranchRecord) -> None:
        """Submits the request to the scheduler, unless its client has left."""
        if self._unsubmitted.pop(request.id):
            self._scheduler.refuse_aborted(request.id)
            return
        self._running[request.id] = branch
        if request.settle:
            branch.run, branch.state = request.id, BranchState.GENERATING
        else:
            branch.readers.add(request.id)
        self._scheduler.submit(request)

    def _ended(self, request: Request) -> None:
        """Called by the scheduler when a request has ended."""
        branch = self._running.pop(request.id)
        settled = self._settled.pop(request.id, None)
        if branch.state is BranchState.GONE:
            return
        if request.id in branch.readers:
            branch.readers.discard(request.id)
            if not branch.readers and branch.state is BranchState.IDLE:
                self._extend_hold(branch)
            return
        outputs = request.tokens[request.prompt_len :].copy()
        if settled is not None:
            self._settle(branch, outputs, settled)
        else:
            self._set_state(branch, BranchState.SETTLING)
            self._outputs[request.id] = (branch, outputs)

    def _settle(self, branch: BranchRecord, outputs: Int32, settled: Settled) -> None:
        branch.tokens, branch.rest = branch.tokens.extended(outputs[: settled.kept]), settled.rest
        self._set_state(branch, BranchState.IDLE)
        self.registry.renew_hold(branch)
        self._resume(branch)

    def _extend_hold(self, branch: BranchRecord) -> None:
        """Renews the hold if it can now protect more: scoring may have computed tokens of the branch itself."""
        if branch.hold is None or branch.hold.tokens < branch.tokens.length:
            self.registry.renew_hold(branch)
        else:
            self.registry.touch(branch)

    def _set_state(self, branch: BranchRecord, state: BranchState) -> None:
        branch.state = state
        self.registry.touch(branch)

    # -- reading -------------------------------------------------------------------------------------------------------

    def counts(self, owner: str | None = None) -> dict[str, Any]:
        """Counts of an owner's branches; None: of all."""
        registry = self.registry
        self._clock.tick()
        registry.sweep()
        branches = [branch for branch in registry if owner is None or branch.namespace[0] == owner]
        counts = {
            "branches": len(branches),
            "generating": sum(branch.state is BranchState.GENERATING for branch in branches),
            "holding": sum(branch.hold is not None for branch in branches),
            "tokens": sum(branch.tokens.length for branch in branches),
        }
        return counts if owner is not None else {**counts, "holds_lost": registry.holds_lost}

    def check(self) -> None:
        """Raises RuntimeError if branches and their requests are inconsistent."""
        self.registry.check()
        for id, branch in self._running.items():
            if branch.state is not BranchState.GONE and id != branch.run and id not in branch.readers:
                raise RuntimeError(f"request {id} runs on branch {branch.id}, which has no record of it")
        for branch in self.registry:
            if branch.state is BranchState.GENERATING and self._running.get(branch.run) is not branch:
                raise RuntimeError(f"branch {branch.id} is generating without a running request")
        for branch in self._waiting:
            if branch.state not in _UNSETTLED:
                raise RuntimeError(f"operations are queued for branch {branch.id}, which is {branch.state.name}")
