"""Our models under EleutherAI's lm-evaluation-harness, which brings the tasks and the metrics.

The harness asks for log-likelihoods of continuations and of whole documents; both come from `qpipe.quality.Scorer`.
Texts longer than the context lose their beginning. Tasks that generate text are refused: none of the zero-shot tasks of
the papers compared here needs it. This module imports `lm_eval`, which the extra `eval` installs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from qpipe.errors import QpipeError, nearest
from qpipe.quality import Scorer


class HarnessModel(TemplateLM):
    """A `Scorer` as the harness wants it.

    Parameters
    ----------
    scorer
        Model and tokenizer.
    end
        Token that ends a document, which stands before texts that have no context.
    """

    def __init__(self, scorer: Scorer, end: int) -> None:
        super().__init__()
        self.scorer, self.end = scorer, end

    @property
    def eot_token_id(self) -> int:
        """Token that ends a document."""
        return self.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; none is added."""
        return self.scorer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = self.scorer.context + 1
        whole = [(context + answer)[-longest:] for _, context, answer in requests]
        counts = [min(len(answer), len(text) - 1) for (_, _, answer), text in zip(requests, whole, strict=True)]
        found = self.scorer.log_probabilities(whole)
        return [
            (float(row[len(row) - count :].double().sum()), self.scorer.greedy(text, count))
            for row, text, count in zip(found, whole, counts, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole documents, each token predicted once (nats)."""
        return [self._document(request.args[0]) for request in requests]

    def _document(self, text: str) -> float:
        windows = utils.get_rolling_token_windows(self.scorer.encode(text), self.end, self.scorer.context, 1)
        pairs = [utils.make_disjoint_window(window) for window in windows]
        return sum(value for value, _ in self._loglikelihood_tokens([("", *pair) for pair in pairs]))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse."""
        raise QpipeError(
            "a task that generates text; give tasks that are scored by log-likelihood, as multiple choice ones"
        )


def run_tasks(model: HarnessModel, tasks: Sequence[str], folder: Path | None, limit: int | None) -> dict[str, Any]:
    """Return the harness's metrics per task.

    Parameters
    ----------
    model
        What is evaluated.
    tasks
        Names of the harness's tasks, or of those described in `folder` (error: unknown names).
    folder
        Further task descriptions (YAML files of the harness), which may name data on this machine.
    limit
        Documents per task; all by default.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise QpipeError(
            [f"no task '{name}'{nearest(name, manager.all_tasks)}; see lm_eval ls tasks" for name in unknown]
        )
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=0,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: dict(values) for name, values in found["results"].items()}
