"""Templates of model cards: the variables, a template of the user, invalid templates."""

from pathlib import Path

import pytest
from golden.make import HERE as GOLDEN
from huggingface_hub import ModelCard

from hf_quantnoise import AutoQuantizedModel, QuantNoiseCard, write_model_card
from hf_quantnoise.publishing.template import VARIABLES, read_template
from hf_quantnoise.runs import glue

METADATA = "---\n{{ card_data }}\n---\n"
MINE = METADATA + "# Mine: {{ title }}\n\n{{ sizes }}\n{% if license %}{{ license }}{% endif %}"
INVALID = {
    "unknown variable 'titel', expected card_data": METADATA + "{{ titel }}",
    "line 4: unexpected '}'": METADATA + "{{ title }",
    "it has no metadata; begin it with": "# {{ title }}",
}


@pytest.fixture(scope="module")
def packed():
    return AutoQuantizedModel.from_pretrained(GOLDEN / "shared")


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "mine.md"
    path.write_text(MINE)
    return path


def test_card_passes_the_variables_of_templates(packed):
    card = QuantNoiseCard()
    config = packed.config.quantization_config
    assert set(card._variables(packed, config, None)) == set(VARIABLES)
    text = read_template()
    assert [name for name in VARIABLES if name not in text] == []


def test_template_of_the_user_replaces_that_of_the_package(packed, template, tmp_path):
    card = QuantNoiseCard(repo_id="me/small", after={"accuracy": 0.5})
    path = write_model_card(packed, tmp_path / "out", card, template=template)
    written = ModelCard.load(path)
    assert "# Mine: small" in written.text and "times smaller" in written.text
    assert "## How to use" not in written.text and "import hf_quantnoise" not in written.text
    assert written.data.eval_results[0].metric_value == 0.5
    # Text around it is kept, and the package's template replaces it again.
    written.text = f"Above.\n{written.text}\nBelow."
    written.save(path)
    text = ModelCard.load(write_model_card(packed, tmp_path / "out", card)).text
    assert text.index("Above.") < text.index("## How to use") < text.index("Below.")
    assert "Mine" not in text


def test_documented_template_works_and_documents_the_variables(packed, template):
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "publishing.md").read_text()
    section = page.split("## Your own template")[1]
    template.write_text(section.split("```text\n")[1].split("```")[0])
    text = str(QuantNoiseCard(repo_id="me/small", template=template).render(packed))
    assert "# small" in text and "Our classifier" in text and "commercial" not in text
    assert [name for name in VARIABLES if f"`{name}`" not in section] == []


@pytest.mark.parametrize("message", INVALID)
def test_invalid_template_raises(message, packed, template):
    template.write_text(INVALID[message])
    with pytest.raises(ValueError) as caught:
        write_model_card(packed, template.parent, template=template)
    assert message in str(caught.value) and str(template) in str(caught.value)
    assert not (template.parent / "README.md").exists()


def test_missing_template_is_an_error_before_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"invalid card template 'nowhere\.md': no such file"):
        glue.parse(
            ["--model_name_or_path", "x", "--task_name", "sst2", "--output_dir", str(tmp_path),
             "--card_template", "nowhere.md"]
        )  # fmt: skip
