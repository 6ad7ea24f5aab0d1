"""One method over one evaluation set."""

import dataclasses
from collections.abc import Sequence

from tqdm import tqdm

from dmax_jax.config import ModelConfig
from dmax_jax.data.tokenizer import Tokenizer
from dmax_jax.decoding.batch import Answer, DecodeSettings, decode_prompts, progress_by_batch
from dmax_jax.decoding.policies import Policy
from dmax_jax.evaluation.metrics import measure, total_seconds
from dmax_jax.evaluation.report import Result
from dmax_jax.evaluation.tasks import Problem, score
from dmax_jax.model.params import Params


def evaluate(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    policy: Policy,
    settings: DecodeSettings,
) -> tuple[Result, list[Answer]]:
    """Decodes and scores all problems; shows progress on stderr."""
    prompts = [tokenizer.encode_prompt(problem.question) for problem in problems]
    decoded = decode_prompts(params, config, prompts, policy, settings)
    whole_batches = progress_by_batch(settings.batch_size)
    answers = list(tqdm(decoded, f"threshold {policy.threshold:g}", total=len(prompts), unit="answer", **whole_batches))
    samples = [
        score(problem, answer, tokenizer.decode(answer.answer_ids))
        for problem, answer in zip(problems, answers, strict=True)
    ]
    seconds = total_seconds(answers, settings.batch_size)
    return Result(dataclasses.asdict(policy), measure(samples, seconds), samples), answers
