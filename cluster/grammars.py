"""The grammars that a leader's answers follow, compiled beside its event loop.

Knows token ids and grammars, neither hosts nor calls.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from engine.config import EngineConfig
from engine.grammar import Constraint, Grammar, GrammarCompiler
from engine.hub import resolve_tokenizer
from engine.text.chat_template import CHATML_END
from engine.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


class Grammars:
    """Makes constraints of grammars; belongs to one event loop, which it does not hold up.

    It reads the tokenizer as soon as it is made, so that the first grammar need not wait for that.

    Args:
        config: The engine's.
        eos_token_ids: The model's.
    """

    def __init__(self, config: EngineConfig, eos_token_ids: Sequence[int]) -> None:
        self._config = config
        self._compiler = asyncio.create_task(asyncio.to_thread(self._make_compiler, eos_token_ids))
        # Who needs it hears of a failure; without grammars there is nobody whom it concerns.
        self._compiler.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def constraint(
        self, grammar: Grammar | None, past_token_ids: Sequence[int]
    ) -> Constraint | None:
        """Begin to follow a grammar behind tokens that have come; None for no grammar.

        Raises:
            RequestError: The grammar cannot be followed.
            CheckpointError: There is no tokenizer.
        """
        if grammar is None:
            return None
        # Another one may wait for the same.
        compiler = await asyncio.shield(self._compiler)
        return await asyncio.to_thread(compiler.constraint, grammar, past_token_ids)

    def close(self) -> None:
        self._compiler.cancel()

    def _make_compiler(self, eos_token_ids: Sequence[int]) -> GrammarCompiler:
        started_s = time.monotonic()
        config = self._config
        directory = resolve_tokenizer(
            config.model_path,
            config.tokenizer_path,
            revision=config.revision,
            download_dir=config.download_dir,
        )
        tokenizer = load_tokenizer(directory)
        ends = [tokenizer.token_id(text) for text in (tokenizer.eos_token, CHATML_END) if text]
        compiler = GrammarCompiler(
            tokenizer,
            end_token_ids=list(
                dict.fromkeys([*eos_token_ids, *(i for i in ends if i is not None)])
            ),
        )
        logger.info("Ready for grammars after %.1f s.", time.monotonic() - started_s)
        return compiler
