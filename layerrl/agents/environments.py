"""Episodes in a text environment, played with a trainer's own generation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from layerrl.agents.episodes import Step
from layerrl.checks import check_count, half_character, is_finite, shown
from layerrl.compatibility import end_tokens, generated_one_each
from layerrl.errors import EpisodeError
from layerrl.replacing import replaced

_ANSWER = "What was answered before."


class TextEnvironment(Protocol):
    """What an agent talks to. It is made once and reset for every episode."""

    def reset(self, **row: Any) -> str:
        """Start an episode.

        Args:
            **row: A copy of the row of the data set, `prompt` included. All that the episode starts
                with has to follow from it: the episodes of a prompt are compared with each other.

        Returns:
            The first observation, which is put behind the prompt.
        """
        ...

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """Take an action.

        Args:
            action: The response, without special tokens.

        Returns:
            The next observation; the reward; whether the episode has ended; whether the action was
            one that the environment knows.
        """
        ...


@dataclass(slots=True, kw_only=True)
class TextRollout:
    """A `rollout_func` that plays all episodes of a batch side by side, turn by turn.

    A completion is response, observation, response, ... with `env_mask` 0 on what is not response.
    It ends with a response. Observations are messages of the user where the prompt is a
    conversation, and plain text otherwise.

    An episode ends when the environment says so. It is cut off after `max_turns`, or when the next
    observation would leave no room for a response in `max_completion_length`: `finished` is False
    for it then, and `layerrl/unfinished_episodes` is the share of those.

    Beside what TRL wants it returns `steps` and `finished`, which reward functions are given too.

    Args:
        environment: Makes an environment. As many are made as episodes are played at once.
        max_turns: Most responses in an episode.
        max_turn_tokens: Most tokens of a response; None: as many as the completion has room for.

    Raises:
        EpisodeError: If it has nothing to make environments of, or a limit is no int from 1 up;
            while playing, if an environment raises or
            returns something else than it should.
    """

    environment: Callable[[], TextEnvironment]
    max_turns: int
    max_turn_tokens: int | None = None
    _pool: list[TextEnvironment] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.environment):
            raise EpisodeError(
                f"environment is {shown(self.environment)}, expected a class or a function that "
                "takes nothing and makes an environment"
            )
        self.max_turns = check_count("max_turns", self.max_turns, EpisodeError)
        if self.max_turn_tokens is not None:
            name = "max_turn_tokens"
            self.max_turn_tokens = check_count(name, self.max_turn_tokens, EpisodeError)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Play an episode for each prompt.

        Args:
            prompts: The prompts, each as often as episodes of it are wanted.
            trainer: A `GiGPOTrainer`, or another of TRL's with the rows in `rollout_rows`.

        Returns:
            What TRL's `rollout_func` returns, with `env_mask`, `steps` and `finished`.

        Raises:
            EpisodeError: If the trainer is another, or an environment goes wrong.
        """
        if not hasattr(trainer, "rollout_rows") or trainer.max_completion_length is None:
            raise EpisodeError(
                f"TextRollout needs the rows behind the prompts in {type(trainer).__name__}"
                ".rollout_rows, as a GiGPOTrainer has them, and a max_completion_length, which is "
                f"{trainer.max_completion_length}"
            )
        while len(self._pool) < len(prompts):
            self._pool.append(self._made())
        played = [
            _Episode(environment, row)
            for environment, row in zip(self._pool, trainer.rollout_rows, strict=False)
        ]
        seen = [_with(prompt, e.observation) for prompt, e in zip(prompts, played, strict=True)]
        for episode, ids in zip(played, trainer._tokenize_prompts(seen)[0], strict=True):
            episode.prompt_ids = list(ids)
        for turn in range(self.max_turns):
            going = [episode for episode in played if episode.going]
            if not going:
                break
            self._respond(going, trainer)
            for episode in going:
                episode.act(trainer)
            for episode in going if turn + 1 < self.max_turns else ():
                episode.observe(trainer, conversation=not isinstance(prompts[0], str))
        logprobs = [episode.logprobs for episode in played]
        return {
            "prompt_ids": [episode.prompt_ids for episode in played],
            "completion_ids": [episode.completion_ids for episode in played],
            "logprobs": None if None in logprobs else logprobs,
            "env_mask": [episode.env_mask for episode in played],
            "steps": [episode.steps for episode in played],
            "finished": [episode.finished for episode in played],
        }

    def _made(self) -> TextEnvironment:
        try:
            made = self.environment()
        except Exception as error:  # whatever it may raise
            raise EpisodeError(
                f"environment={self.environment!r:.80} raised {error!r}; expected a class or a "
                "function that takes nothing and makes an environment"
            ) from error
        if any(made is other for other in self._pool):
            raise EpisodeError(
                f"environment={self.environment!r:.80} gave {made!r:.80} a second time, expected a "
                "new environment each time: episodes are played side by side, and cannot share one"
            )
        return made

    def _respond(self, going: list[_Episode], trainer: Any) -> None:
        rooms = [trainer.max_completion_length - len(e.completion_ids) for e in going]
        with _at_most(trainer, min(max(rooms), self.max_turn_tokens or max(rooms))):
            responses, logprobs = generated_one_each(
                trainer, [episode.prompt_ids + episode.completion_ids for episode in going]
            )
        for row, (episode, room) in enumerate(zip(going, rooms, strict=True)):
            episode.response = responses[row][:room]
            episode.add(episode.response, None if logprobs is None else logprobs[row][:room])


@dataclass(slots=True)
class _Episode:
    """An episode as far as it has been played."""

    environment: TextEnvironment
    row: dict[str, Any]
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    env_mask: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    response: list[int] = field(default_factory=list)
    observation: str = field(init=False)
    going: bool = True
    finished: bool = False

    def __post_init__(self) -> None:
        with self._named("reset"):
            self.observation = self._text(self.environment.reset(**copy.deepcopy(self.row)))

    def add(self, ids: list[int], logprobs: list[float] | None, *, mask: int = 1) -> None:
        """Put tokens behind the completion."""
        self.completion_ids = self.completion_ids + ids
        self.env_mask = self.env_mask + [mask] * len(ids)
        if self.logprobs is None or logprobs is None:
            self.logprobs = None  # TRL's own generation knows none
        else:
            self.logprobs = [*self.logprobs, *logprobs]

    def act(self, trainer: Any) -> None:
        """Take the response for an action."""
        action = trainer._tokenizer.decode(self.response, skip_special_tokens=True)
        with self._named(f"step({action!r:.80})"):
            observation, reward, done, valid = self.environment.step(action)
            next_observation = self._text(observation)
            if not is_finite(reward):
                raise EpisodeError(f"gave the reward {reward!r}, expected a finite number")
            for name, flag in (("done", done), ("valid", valid)):
                if not isinstance(flag, bool | np.bool_):
                    raise EpisodeError(
                        f"gave {flag!r:.80} for {name}, expected True or False: a step returns "
                        "observation, reward, done, valid"
                    )
        self.steps.append(
            Step(
                observation=self.observation,
                reward=float(reward),
                num_tokens=len(self.response),
                valid=bool(valid),
            )
        )
        self.observation = next_observation
        self.finished = bool(done)
        self.going = not self.finished

    def observe(self, trainer: Any, *, conversation: bool) -> None:
        """Put the observation behind the response, if that leaves room for another one."""
        if not self.going:
            return
        ids = _observation_ids(trainer, self.observation, conversation=conversation)
        if self.response[-1:] and self.response[-1] not in end_tokens(trainer):
            ids = [trainer._tokenizer.eos_token_id, *ids]
        self.going = len(self.completion_ids) + len(ids) < trainer.max_completion_length
        if self.going:
            self.add(ids, [0.0] * len(ids), mask=0)

    @contextmanager
    def _named(self, call: str) -> Iterator[None]:
        """Say where it was that the environment went wrong."""
        try:
            yield
        except Exception as error:  # whatever an environment may raise
            what = str(error) if isinstance(error, EpisodeError) else f"raised {error!r}"
            row = {name: value for name, value in self.row.items() if name != "prompt"}
            raise EpisodeError(
                f"{type(self.environment).__name__}.{call}, turn {len(self.steps)} of the row "
                f"{row!r:.200}, {what}"
            ) from error

    @staticmethod
    def _text(observation: object) -> str:
        if isinstance(observation, str):
            if half := half_character(observation):
                raise EpisodeError(
                    f"gave a text to observe that has {half!r:.20}, half of a character, which no "
                    f"tokenizer takes ({observation!r:.80})"
                )
            return observation
        raise EpisodeError(
            f"gave a {type(observation).__name__} to observe, expected text ({observation!r:.80})"
        )


def _with(prompt: Any, observation: str) -> Any:
    """A prompt and the first observation, put together as TRL does it for its environments."""
    if isinstance(prompt, str):
        return prompt + observation
    content = prompt[-1]["content"]
    is_list = isinstance(content, list)
    behind: Any = [{"type": "text", "text": observation}] if is_list else observation
    return [*prompt[:-1], {**prompt[-1], "content": content + behind}]


def _observation_ids(trainer: Any, observation: str, *, conversation: bool) -> list[int]:
    """The tokens between two responses."""
    tokenizer, text = trainer._tokenizer, observation
    if conversation:
        # What the template puts behind an answer, less the end of it, which the model writes.
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": observation},
        ]
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **trainer.chat_template_kwargs,
        )
        _, answer, text = rendered.partition(_ANSWER)
        if not answer:
            raise EpisodeError(
                "the chat template does not show an assistant's message as it is, so what it puts "
                f"behind one cannot be told: {rendered!r:.200}. Use prompts of plain text."
            )
        for end in tokenizer.convert_ids_to_tokens(end_tokens(trainer)):
            text = text.removeprefix(end)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _at_most(trainer: Any, num_tokens: int) -> AbstractContextManager[None]:
    if getattr(trainer, "vllm_generation", None) is not None:
        return replaced(trainer.vllm_generation, max_completion_length=num_tokens)
    return replaced(trainer.generation_config, max_new_tokens=num_tokens)
