"""Rows that are a picture and words: captions, and questions with answers."""


def from_caption(row) -> list[dict]:
    """A picture, the task's prompt if there is one, and what the assistant says of it."""
    pictures = row.pictures()
    if not pictures and not row.prompt:
        raise row.error(
            row.image_column or "image", "is missing",
            "give one, or set prompt for rows of text alone",
        )  # fmt: skip
    return _exchange(pictures, row.prompt, row.text("caption"))


def from_vqa(row) -> list[dict]:
    """A picture or none, a question, an answer; ``{question}`` in a prompt is the question."""
    question = row.text("question")
    if row.prompt:
        question = row.prompt.replace("{question}", question)
    return _exchange(row.pictures(), question, row.text("answer"))


def _exchange(pictures: list, question: str | None, answer: str) -> list[dict]:
    content = question
    if pictures:
        content = [{"type": "image", "image": picture} for picture in pictures]
        content += [{"type": "text", "text": question}] if question else []
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
