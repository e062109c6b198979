"""docs/recipe.md is what the code reads."""

from pathlib import Path

from mmpeft import reference

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"


def test_the_page_of_recipe_keys_is_made_from_the_code():
    remedy = "run: python -m mmpeft.reference > docs/recipe.md"
    assert PAGE.read_text() == reference.reference(), remedy


def test_the_page_has_every_section_and_the_keys_of_a_recipe():
    page = reference.reference()
    assert "| `gate` | none, sample, image_tokens, after_image, null | `null` |" in page
    assert "| `adapter_learning_rate` | float | `0.0002` | peak learning rate" in page
    assert "### `MLPConnectorConfig`" in page and "### `EasyVQA`" in page
    assert ":meth:" not in page and "``" not in page.replace("```", "")
    assert "| `inference_mode` |" not in page  # peft's own
