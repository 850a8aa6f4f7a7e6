"""Which format a model calls tools in, by name or by what its chat template writes."""

from engine.text.chat_template import ChatMLTemplate, ChatTemplate
from engine.text.tool_formats import ToolFormat
from engine.text.tools_hermes import HermesFormat
from engine.text.tools_qwen3_coder import Qwen3CoderFormat
from engine.text.tools_react import ReActFormat


def tool_format_of(template: ChatTemplate | None, name: str = "auto") -> ToolFormat | None:
    """The format of a model's calls; None if it knows no tools.

    Args:
        template: The model's.
        name: hermes, qwen3_coder or react; auto goes by the template; none for no tools.
    """
    if name == "auto":
        name = _name_of(template)
    match name:
        case "hermes":
            return HermesFormat()
        case "qwen3_coder":
            return Qwen3CoderFormat()
        case "react":
            return ReActFormat()
        case _:
            return None


def _name_of(template: ChatTemplate | None) -> str:
    if template is None:
        return "none"
    if isinstance(template, ChatMLTemplate):
        return "react"
    if "tools" not in template.source:
        return "none"
    if "<function=" in template.source:
        return "qwen3_coder"
    return "hermes" if "<tool_call>" in template.source else "none"
