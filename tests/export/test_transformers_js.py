"""transformers.js loads exported folders in Node.js and gives the answers of torch.

Set TRANSFORMERS_JS to a folder in which `npm install @huggingface/transformers@4.3.2` was run.
"""

import json
import os
import shutil
import subprocess

import pytest
import torch
from support.onnx_exports import packed

from hf_quantnoise import export_onnx

FOLDER = os.environ.get("TRANSFORMERS_JS", "")
PROMPT = [[1, 17, 203, 9, 64], [1, 5, 6, 7, 8]]
SCRIPT = """
import { env, AutoModelForCausalLM, Tensor, ones_like } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = process.argv[1];
const model = await AutoModelForCausalLM.from_pretrained("out");
const ids = JSON.parse(process.argv[2]);
const input_ids = new Tensor("int64", ids.flat().map(BigInt), [ids.length, ids[0].length]);
const attention_mask = ones_like(input_ids);
const options = { max_new_tokens: 8, do_sample: false, eos_token_id: -1 };
const found = await model.generate({ input_ids, attention_mask, ...options });
console.log(JSON.stringify(found.tolist().map((row) => row.map(Number))));
"""
needs_node = pytest.mark.skipif(
    not shutil.which("node") or not os.path.isdir(os.path.join(FOLDER, "node_modules")),
    reason="needs Node.js, and TRANSFORMERS_JS=folder with @huggingface/transformers",
)


@needs_node
@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_decoder_generates_the_tokens_of_torch(name, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    model = packed(name)
    export_onnx(model, tmp_path / "out")
    ids = torch.tensor(PROMPT)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    done = subprocess.run(
        ["node", "--input-type=module", "-e", SCRIPT, f"{tmp_path}/", json.dumps(PROMPT)],
        cwd=FOLDER, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()
