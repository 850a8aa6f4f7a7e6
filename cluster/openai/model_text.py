"""A model's text: what its tokenizer and its template make of requests, and of tokens again."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.openai.answer_form import AnswerForm, AnswerForms
from cluster.openai.chat_prompt import render_messages
from cluster.openai.engine_client import ChoiceRequest, EngineInfo
from cluster.openai.sampling import make_sampling_params, num_samples
from cluster.openai.schema import ChatCompletionRequest, CompletionRequest
from cluster.openai.structured_output import grammar_source
from cluster.openai.tools import tool_choice_of
from engine.errors import RequestError
from engine.grammar import Grammar
from engine.text.chat_template import ChatTemplate
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer
from engine.text.tool_parsers import tool_format_of


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What became of a conversation.

    Attributes:
        token_ids: Not empty.
        form: Of the answer.
        has_special_tokens: A message spells out a control token.
    """

    token_ids: list[int]
    form: AnswerForm
    has_special_tokens: bool


class ModelText:
    """Requests to token ids and tokens to text; may be called from several threads.

    Args:
        tokenizer: The model's.
        template: None for a model that knows no conversations.
        tool_call_parser, reasoning_parser: The configuration's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._forms = AnswerForms(
            tokenizer,
            template,
            tool_format=tool_format_of(template, tool_call_parser),
            has_reasoning=reasoning_parser != "none",
        )

    def encode_chat(self, body: ChatCompletionRequest) -> ChatPrompt:
        """The prompt of a conversation, and what form its answer has.

        Raises:
            RequestError: The template refuses the messages, or makes nothing of them; or they may
                not be answered as the request wants it.
        """
        choice = tool_choice_of(body)
        prompt = self.tokenizer.encode(render_messages(body, self._template, choice))
        if not prompt:
            raise RequestError("The chat template made an empty prompt.", param="messages")
        contents = (message.content or "" for message in body.messages)
        has_special_tokens = any(self.tokenizer.find_special(content) for content in contents)
        return ChatPrompt(prompt, self._forms.form(body, prompt, choice), has_special_tokens)

    def make_choices(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        prompts: Sequence[Sequence[int]],
        info: EngineInfo,
    ) -> tuple[ChoiceRequest, ...]:
        """Each prompt's choices, of which the answer has n.

        Raises:
            RequestError: The engine can never serve one of them.
        """
        is_chat = isinstance(body, ChatCompletionRequest)
        choices: list[ChoiceRequest] = []
        for prompt in map(tuple, prompts):
            sampling = make_sampling_params(
                body,
                info=info,
                prompt_len=len(prompt),
                prompt_field="messages" if is_chat else "prompt",
                stop_token_ids=self._format_stop_token_ids(is_chat=is_chat),
            )
            choices += [
                ChoiceRequest(prompt_token_ids=prompt, sampling=sampling, sample_index=index)
                for index in range(num_samples(body))
            ]
        return tuple(choices)

    def form(self, body: ChatCompletionRequest, prompt: Sequence[int]) -> AnswerForm:
        """The form of the answer to a chat that has become this prompt; raises as `encode_chat`."""
        return self._forms.form(body, prompt, tool_choice_of(body))

    def grammar(
        self, body: ChatCompletionRequest | CompletionRequest, form: AnswerForm | None = None
    ) -> Grammar | None:
        """What an answer must be; None for anything. Takes milliseconds.

        Args:
            body: The request.
            form: Of the answer to a chat.

        Raises:
            RequestError: It cannot be followed.
        """
        if isinstance(body, ChatCompletionRequest) and form is not None:
            return self._forms.grammar(body, form)
        source = grammar_source(body)
        return None if source is None else Grammar(source)

    def detokenizer(
        self, body: ChatCompletionRequest | CompletionRequest, stop: Sequence[str] = ()
    ) -> Detokenizer:
        """What makes text of one choice's tokens, as the request wants it.

        Args:
            stop: Strings that end it, beside the client's.
        """
        return Detokenizer(
            self.tokenizer,
            stop=[*body.stop, *stop],
            include_stop=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            min_tokens=body.min_tokens,
        )

    def _format_stop_token_ids(self, *, is_chat: bool) -> list[int]:
        """End tokens that the checkpoint's config may not name: the tokenizer's, the format's."""
        tokens = [self.tokenizer.eos_token]
        if is_chat and self._template is not None:
            tokens += self._template.stop_tokens
        ids = [self.tokenizer.token_id(token) for token in tokens if token]
        return [token_id for token_id in ids if token_id is not None]
