"""WebNLG 2017: up to seven facts from DBpedia in words.

6,940 / 1,862 sets of facts with about 2.6 references each. Half of the test sets are about kinds of
things that do not occur in the training data (``unseen``). Each line of a file is ``{"category":
"Airport", "triples": ["Aarhus | leaderName | Jacob_Bundsgaard"], "refs": ["The leader of ..."]}``.
Source: Gardent et al. 2017, "The WebNLG Challenge: Generating Text from RDF Data", INLG; CC
BY-NC-SA 4.0.
"""

from dataclasses import dataclass

from mmpeft.text_task import GenerationTask, field, read_jsonl, texts

# the categories of the training data
SEEN = {
    "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam",
    "University", "WrittenWork",
}  # fmt: skip


@dataclass
class WebNLG(GenerationTask):
    """
    Attributes:
        train: JSONL file; each reference is a row to learn from.
        test: JSONL file.
    """

    name = "webnlg"
    max_new_tokens = 128
    request = "Put these facts into words."

    train: str | None = "data/webnlg/train.jsonl"
    test: str | None = "data/webnlg/test.jsonl"

    def read(self, path, split):
        rows = []
        for where, entry in read_jsonl(path):
            triples, references = texts(entry, "triples", where), texts(entry, "refs", where)
            row = {
                "facts": "\n".join(triple.replace("_", " ") for triple in triples),
                "category": field(entry, "category", str, where),
                "refs": references,
                "where": where,
            }
            learned = references if split == "train" else references[:1]
            rows += [row | {"answer": answer} for answer in learned]
        return rows

    def question_type(self, row):
        return "seen" if row["category"] in SEEN else "unseen"
