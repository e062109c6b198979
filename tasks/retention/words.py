"""Is a fact told in words the right one?"""

import re
import unicodedata


def fold(text: str) -> str:
    """Without case and accents: "Bogotá" and "bogota" are the same."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(char for char in letters if not unicodedata.combining(char)).casefold()


def position(answer: str, reply: str) -> float:
    """Where the answer begins in the reply, as whole words; infinity if nowhere."""
    words = r"\W+".join(map(re.escape, fold(answer).split()))
    found = re.search(rf"(?<!\w){words}(?!\w)", fold(reply))
    return found.start() if found else float("inf")


def right_answer_first(doc: dict, results: list[str]) -> dict:
    """lm-eval's process_results: `acc` is 1 if the reply holds `answer` and none of `wrong` before
    it, else 0. Two answers cannot begin at the same place unless one begins with the other; the
    right one counts then."""
    right = position(doc["answer"], results[0])
    first_wrong = min(position(wrong, results[0]) for wrong in doc["wrong"])
    return {"acc": float(right < float("inf") and right <= first_wrong)}
