"""Writes the errors of a plain bf16 computation of golden cases, against which the engine's bf16 is judged.

    python plain_bf16.py REFERENCE_DIR CASE_DIR ...

REFERENCE_DIR holds losses.py, the semantics in PyTorch. The model is converted to bf16 as a whole (weights, hidden states, gradients);
softmax, LayerNorm and cross entropy are f32 inside, as PyTorch's own are. Each case gets plain_bf16.json: for every loss and gradient of
expected.safetensors the relative error ‖x − expected‖ / ‖expected‖. Needs torch, transformers and safetensors.
"""
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

sys.path.insert(0, sys.argv[1])
import losses  # noqa: E402

# The loss itself is not rounded: the engine sums losses in f32, too.
losses.token_loss = lambda lm, hidden, labels: F.cross_entropy(lm.cls(hidden).float().flatten(0, 1), labels.flatten())


def case(folder):
    config = BertConfig.from_pretrained(folder / "model")
    config._attn_implementation = "eager"
    lm = BertForMaskedLM(config).eval()
    weights = load_file(folder / "model/model.safetensors")
    lm.load_state_dict(weights, strict=False)
    lm.tie_weights()
    lm = lm.to(torch.bfloat16)
    batch = load_file(folder / "batch.safetensors")
    objective = json.loads((folder / "case.json").read_text())["objective"]
    named = dict(lm.named_parameters())
    if objective == "retromae":
        decoder = losses.EnhancedDecoder(config).eval()
        state = load_file(folder / "model/enhanced_decoder.safetensors")
        decoder.load_state_dict({k.removeprefix("c_head."): v for k, v in state.items()})
        decoder = decoder.to(torch.bfloat16)
        named |= {f"c_head.{k}": v for k, v in decoder.named_parameters()}
        out = losses.retromae(lm, decoder, batch)
    else:
        hidden = lm.bert(batch["encoder_input_ids"], attention_mask=batch["encoder_attention_mask"]).last_hidden_state
        out = {"loss": losses.token_loss(lm, hidden, batch["encoder_labels"])}
    out["loss"].backward()
    got = {k: v.detach() for k, v in out.items()} | {f"grad.{k}": v.grad for k, v in named.items() if v.grad is not None}
    expected = load_file(folder / "expected.safetensors")
    error = lambda name: ((got[name].double() - expected[name].double()).norm() / expected[name].double().norm()).item()
    errors = {name: float(f"{error(name):.3e}") for name in sorted(expected)}
    (folder / "plain_bf16.json").write_text(json.dumps(errors, indent=1) + "\n")
    gradients = sorted(e for name, e in errors.items() if name.startswith("grad.") and "key.bias" not in name)
    print(folder, "loss", errors["loss"], "gradients", gradients[0], "to", gradients[-1])


for name in sys.argv[2:]:
    case(pathlib.Path(name))
