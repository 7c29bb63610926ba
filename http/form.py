"""Bodies of forms that upload files: ``multipart/form-data`` (RFC 7578), taken apart where it lies in memory."""

from collections.abc import Mapping
from email.message import Message
from typing import Final

from llamaherd.http.problems import INVALID_REQUEST, Problem

__all__ = ["MOST_FIELDS", "parse_form", "texts_of"]

#: Most fields of one form. What else is in a body of the allowed size would cost more to take apart than to read.
MOST_FIELDS: Final = 64
#: Longest head of one field.
_MOST_HEAD: Final = 16 * 1024


def parse_form(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the fields of a form by their names; of several of one name the last.

    Raises:
        Problem: 400, the body is no form, is damaged, or has more than :data:`MOST_FIELDS` fields.
    """
    kind = Message()
    kind["content-type"] = content_type
    boundary = kind.get_boundary()
    if kind.get_content_type() != "multipart/form-data" or not boundary:
        raise Problem(INVALID_REQUEST, "the request body must be a form, multipart/form-data with a boundary")
    delimiter = b"\r\n--" + boundary.encode("utf-8", "replace")
    # What stands before the first delimiter is nobody's.
    parts = (b"\r\n" + body).split(delimiter, MOST_FIELDS + 1)[1:]
    if not parts or not parts[-1].startswith(b"--"):
        if len(parts) > MOST_FIELDS:
            raise Problem(INVALID_REQUEST, f"the form has more than {MOST_FIELDS} fields")
        raise _damaged("it has no end")
    return dict(map(_field, parts[:-1]))


def texts_of(fields: Mapping[str, bytes]) -> dict[str, str]:
    """Return fields as texts. Raises Problem if one is no UTF-8."""
    texts: dict[str, str] = {}
    for name, value in fields.items():
        try:
            texts[name] = value.decode()
        except UnicodeDecodeError:
            raise Problem(INVALID_REQUEST, f"{name[:100]}: the text is not valid UTF-8", param=name[:100]) from None
    return texts


def _field(part: bytes) -> tuple[str, bytes]:
    # Spaces may follow a delimiter; the head may be empty, and its line break is then the delimiter's own.
    end = part.find(b"\r\n\r\n", 0, _MOST_HEAD)
    if end < 0 or part[: part.index(b"\r\n")].strip(b" \t"):
        raise _damaged("a field has no head")
    head = Message()
    for line in part[:end].decode("utf-8", "replace").split("\r\n"):
        title, _, value = line.partition(":")
        if title.strip().lower() == "content-disposition":
            head["content-disposition"] = value.strip()
            break
    name = head.get_param("name", header="content-disposition")
    if head.get_content_disposition() != "form-data" or not isinstance(name, str):
        raise _damaged("a field has no name")
    return name, part[end + 4 :]


def _damaged(reason: str) -> Problem:
    return Problem(INVALID_REQUEST, f"the form is damaged: {reason}")
