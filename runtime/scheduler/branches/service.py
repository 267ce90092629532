"""What a server does with branches: each operation checked, put in order, and turned into engine requests.

Runs on the scheduler's thread. An operation that meets a branch whose end is not known yet (it has just generated, or
its last text is being tokenized) waits for it here; every one is answered exactly once.
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
from ...step import Int32
from ...tokenizer.pieces import tokens_from_bytes, tokens_to_bytes
from ..request import Request
from ..scheduler import Scheduler
from .registry import Branch, Branches, State
from .trail import EMPTY, Trail

Message = BranchOp | BranchRun
_UNSETTLED = (State.SETTLING, State.ENCODING)


class BranchService:
    """``replies`` and ``to_encode`` are for the owner of the core to take and deliver after each message and step.

    ``encode``: tokenizes a message in place (in process); without it, messages that need it go to ``to_encode`` and
    come back with ``again`` set.
    """

    def __init__(self, scheduler: Scheduler, config: EngineConfig) -> None:
        self._scheduler = scheduler
        self._clock = scheduler.clock
        self.registry = Branches(
            scheduler.tree, max_branches=config.max_branches, ttl=config.branch_ttl, now=scheduler.clock
        )
        scheduler.ledger.holders = self.registry
        self.encode: Callable[[Message], None] | None = None
        self.replies: list[ControlReply] = []
        self.waiters: dict[int, Callable[[ControlReply], None]] = {}  # in process: who takes an operation's reply
        self.to_encode: list[Message] = []
        self._running: dict[int, Branch] = {}  # by engine request: those the scheduler has
        self._outputs: dict[int, tuple[Branch, Int32]] = {}  # ended, and not settled yet
        self._verdicts: dict[int, Settled] = {}  # settled, and not ended yet
        self._waiting: dict[Branch, list[Message]] = {}  # until the branch's end is known
        self._held_back: dict[int, bool] = {}  # engine requests not with the scheduler yet -> their client has left

    # -- in ------------------------------------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        """One operation, from the tokenizer or from a caller in process. What is wrong with it becomes its answer."""
        self._clock.tick()
        if isinstance(message, BranchRun) and not message.again:
            self._held_back.update(dict.fromkeys(message.ids, False))
        self._dispatch(message)

    def settled(self, message: Settled) -> None:
        """Where the text that a request on a branch returned has ended."""
        self._clock.tick()
        ended = self._outputs.pop(message.id, None)
        if ended is not None:
            self._settle(*ended, message)
        elif message.id in self._running:
            self._verdicts[message.id] = message

    def abort(self, request_id: int) -> None:
        """The client of a request that the scheduler may not have yet has left."""
        if request_id in self._held_back:
            self._held_back[request_id] = True

    # -- order ---------------------------------------------------------------------------------------------------------

    def _dispatch(self, message: Message) -> None:
        branch: Branch | None = None
        try:
            if message.branch:
                branch = self.registry.get(message.branch, message.namespace[0])
                if not self._is_its_turn(branch, message):
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

    def _is_its_turn(self, branch: Branch, message: Message) -> bool:
        """Whether to go on with the message. If not, it waits here, or is with the tokenizer."""
        if message.again:
            self._become(branch, State.IDLE)
            return True
        kind = message.what if isinstance(message, BranchOp) else "generate"
        if kind == "delete":
            return True
        if branch.state in _UNSETTLED:
            self._waiting.setdefault(branch, []).append(message)
            return False
        if branch.state is State.GENERATING and kind != "get":
            raise InvalidRequest(
                "branch",
                f"{branch.id} is generating: wait for its answer, fork it before it generates, or delete it",
                status=409,
            )
        if branch.rest and message.refusal is None and self._needs_all_tokens(message):
            self._put_before(branch.rest, message)
            if self.encode is None:
                self._become(branch, State.ENCODING)
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

    def _resume(self, branch: Branch) -> None:
        """The branch's end is known: what waited for it goes on, in order, as far as it can."""
        for message in self._waiting.pop(branch, ()):
            self._dispatch(message)

    def _refuse(self, message: Message, error: InvalidRequest) -> None:
        if isinstance(message, BranchOp):
            self._reply(ControlReply(message.id, False, None, Refusal.of(error)))
            return
        for id in message.ids:
            if id in self._held_back:  # not those of it that the scheduler has taken already
                self._leave(id, error)

    def _reply(self, reply: ControlReply) -> None:
        waiter = self.waiters.pop(reply.id, None)
        if waiter is None:
            self.replies.append(reply)
        else:
            waiter(reply)

    def _leave(self, id: int, error: InvalidRequest) -> None:
        if self._held_back.pop(id):
            self._scheduler.refuse_aborted(id)
        else:
            self._scheduler.refuse(id, error)

    # -- operations ----------------------------------------------------------------------------------------------------

    def _operate(self, op: BranchOp, branch: Branch | None) -> Any:
        registry = self.registry
        if op.what == "create":
            return self._create(op, branch)
        if branch is None:
            raise InvalidRequest("branch", "must be named")
        if op.what == "fork":
            return {"ids": [child.id for child in registry.fork(branch, op.n)], **self._facts(branch)}
        if op.what == "extend":
            branch.trail, branch.rest = self._extended(branch.trail, op.piece), self._rest_after(branch, op.piece)
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
            "generating": branch.state is State.GENERATING,
        }
        return facts | ({"tokens": tokens_to_bytes(branch.trail.tokens())} if op.tokens else {})

    def _create(self, op: BranchOp, parent: Branch | None) -> Any:
        if parent is None:
            branch = self.registry.create(op.namespace, self._extended(EMPTY, op.piece), op.ttl)
        else:
            trail, rest = self._extended(parent.trail, op.piece), self._rest_after(parent, op.piece)
            branch = self.registry.fork(parent, 1, op.ttl)[0]
            branch.trail, branch.rest = trail, rest
        return {"id": branch.id, **self._facts(branch)}

    def _facts(self, branch: Branch) -> dict[str, Any]:
        return {"num_tokens": branch.trail.length, "expires_in": branch.ttl}

    def _extended(self, trail: Trail, piece: Piece | None) -> Trail:
        """The branch's tokens and the piece's. Raises `InvalidRequest` if they could not even be computed."""
        if piece is None or piece.empty:
            return trail
        tokens = tokens_from_bytes(piece.tokens if trail.length or piece.first is None else piece.first)
        if len(tokens):
            limits = self._scheduler.limits
            fit(trail.length + len(tokens), SamplingParams(max_tokens=0), limits, path="branch")
            check_token_ids(tokens, limits.vocab_size, "branch")
        return trail.then(tokens)

    def _rest_after(self, branch: Branch, piece: Piece | None) -> str:
        """What is left of the text at its end: nothing, once it has been tokenized with the piece."""
        return branch.rest if piece is None or piece.empty else ""

    def _delete(self, branch: Branch) -> None:
        ids = [*branch.readers, *([branch.run] if branch.state is State.GENERATING else [])]
        self._outputs.pop(branch.run, None)
        self.registry.remove(branch)
        for id in ids:
            self._scheduler.abort(id)
        self._resume(branch)  # they hear that it is gone

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _run(self, run: BranchRun, branch: Branch) -> None:
        if run.continuations is None:
            self._generate(run, branch)
        else:
            self._score(run, branch, run.continuations)
        self.registry.touch(branch)

    def _generate(self, run: BranchRun, branch: Branch) -> None:
        trail, rest = self._extended(branch.trail, run.piece), self._rest_after(branch, run.piece)
        if not trail.length:
            raise InvalidRequest("branch", f"{branch.id} is empty: extend it before it generates")
        params = fit(trail.length, run.params, self._scheduler.limits, path="branch")
        # From here on it cannot fail: what is appended stays, even if the client has left.
        branch.trail, branch.rest = trail, rest
        prompt = trail.tokens()
        for i, id in enumerate(run.ids):  # the first sample stays in the branch
            echo_from = 0 if run.echo_tokens else None
            self._submit(self._request(id, prompt, params.sample(i), run, branch, echo_from, settle=i == 0), branch)

    def _score(self, run: BranchRun, branch: Branch, continuations: list[Piece]) -> None:
        if not branch.trail.length:
            raise InvalidRequest("branch", f"{branch.id} is empty: a continuation has nothing to follow")
        limits = self._scheduler.limits
        opening = tokens_from_bytes(run.opening)
        trunk = branch.trail.tokens()
        wholes: list[tuple[Int32, int]] = []  # and where what is scored begins
        alone: list[tuple[Int32, int]] = []
        for i, piece in enumerate(continuations):
            field, tokens = f"continuations[{i}]", tokens_from_bytes(piece.tokens)
            if len(tokens) == piece.left:
                raise InvalidRequest(field, "must not be empty")
            longest = max(len(trunk), len(opening)) + len(tokens)
            fit(longest, SamplingParams(max_tokens=0), limits, path=field, counted="tokens with its branch")
            check_token_ids(tokens, limits.vocab_size, field)
            wholes.append((np.concatenate((trunk, tokens)), len(trunk) + piece.left))
            alone.append((np.concatenate((opening, tokens[piece.left :])), len(opening)))
        for id, (whole, start) in zip(run.ids, [*wholes, *(alone if run.unconditional else [])], strict=True):
            params = msgspec.structs.replace(run.params, prompt_logprob_start=start)
            self._submit(self._request(id, whole, params, run, branch, start), branch)

    def _request(
        self,
        id: int,
        prompt: Int32,
        params: SamplingParams,
        run: BranchRun,
        branch: Branch,
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

    def _submit(self, request: Request, branch: Branch) -> None:
        """Hands it to the scheduler, unless its client has left."""
        if self._held_back.pop(request.id):
            self._scheduler.refuse_aborted(request.id)
            return
        self._running[request.id] = branch
        if request.settle:
            branch.run, branch.state = request.id, State.GENERATING
        else:
            branch.readers.add(request.id)
        self._scheduler.submit(request)

    def _ended(self, request: Request) -> None:
        """The scheduler's last word about a request."""
        branch = self._running.pop(request.id)
        verdict = self._verdicts.pop(request.id, None)
        if branch.state is State.GONE:
            return
        if request.id in branch.readers:
            branch.readers.discard(request.id)
            if not branch.readers and branch.state is State.IDLE:
                self._keep_more(branch)
            return
        outputs = request.tokens[request.prompt_len :].copy()
        if verdict is not None:
            self._settle(branch, outputs, verdict)
        else:
            self._become(branch, State.SETTLING)
            self._outputs[request.id] = (branch, outputs)

    def _settle(self, branch: Branch, outputs: Int32, verdict: Settled) -> None:
        branch.trail, branch.rest = branch.trail.then(outputs[: verdict.kept]), verdict.rest
        self._become(branch, State.IDLE)
        self.registry.keep(branch)
        self._resume(branch)

    def _keep_more(self, branch: Branch) -> None:
        """What was scored may have been computed for the first time, the branch itself with it."""
        if branch.hold is None or branch.hold.tokens < branch.trail.length:
            self.registry.keep(branch)
        else:
            self.registry.touch(branch)

    def _become(self, branch: Branch, state: State) -> None:
        branch.state = state
        self.registry.touch(branch)

    # -- looking -------------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, Any]:
        """Facts for an operator."""
        registry = self.registry
        self._clock.tick()
        registry.sweep()
        branches = list(registry)
        return {
            "branches": len(branches),
            "generating": sum(branch.state is State.GENERATING for branch in branches),
            "holding": registry.holding,
            "holds_lost": registry.holds_lost,
            "tokens": sum(branch.trail.length for branch in branches),
        }

    def check(self) -> None:
        """Raises RuntimeError if branches and their requests do not add up."""
        self.registry.check()
        for id, branch in self._running.items():
            if branch.state is not State.GONE and id != branch.run and id not in branch.readers:
                raise RuntimeError(f"request {id} runs on branch {branch.id}, which does not know it")
        for branch in self.registry:
            if branch.state is State.GENERATING and self._running.get(branch.run) is not branch:
                raise RuntimeError(f"branch {branch.id} is generating, and no request of it runs")
        for branch in self._waiting:
            if branch.state not in _UNSETTLED:
                raise RuntimeError(f"operations wait for branch {branch.id}, which is {branch.state.name}")
