"""Writes the errors of a plain bf16 computation of golden cases, against which the engine's bf16 is judged.

    python plain_bf16.py REFERENCE_DIR CASE_DIR ...

REFERENCE_DIR holds losses.py, the semantics in PyTorch. The model is converted to bf16 as a whole (weights, hidden states, gradients);
softmax, LayerNorm and cross entropy are f32 inside, as PyTorch's own are. Each case gets plain_bf16.json: for every loss and gradient of
expected.safetensors the relative error ‖x − expected‖ / ‖expected‖. The few queries of a fine-tuning case may be off in opposite
directions, so its losses count as off by the mean of what their queries are off. Needs torch, transformers and safetensors.
"""
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

sys.path.insert(0, sys.argv[1])
import losses  # noqa: E402

# The loss itself is not rounded: the engine sums losses in f32, too.
losses.token_loss = lambda lm, hidden, labels: F.cross_entropy(lm.cls(hidden).float().flatten(0, 1), labels.flatten())


def model(kind, folder, dtype, **more):
    config = BertConfig.from_pretrained(folder, **({"num_labels": 1} if kind is BertForSequenceClassification else {}))
    config._attn_implementation = "eager"
    made = kind(config, **more).eval()
    made.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if kind is BertForMaskedLM:
        made.tie_weights()
    return made.to(dtype)


def finetuned(folder, options, batch, dtype=torch.bfloat16):
    """Losses and named parameters of a bi-encoder or cross-encoder. Scores and losses are f32 from bf16 embeddings."""
    if options["objective"] == "cross-encoder":
        ranker = model(BertForSequenceClassification, folder / "model", dtype)
        # The classifier's one number a pair is not rounded: it is a score.
        wide = torch.promote_types(dtype, torch.float32)
        ranker.classifier = ranker.classifier.to(wide)
        ranker.dropout.register_forward_hook(lambda _module, _inputs, out: out.to(wide))
        return losses.cross_encoder(ranker, batch, options["group_size"]), dict(ranker.named_parameters())
    subs = ["query_model", "passage_model"] if options.get("untied") else [""]
    models = [model(BertModel, folder / "model" / sub, dtype, add_pooling_layer=False) for sub in subs]
    named = {f"{sub + '.' if sub else ''}{k}": v for sub, m in zip(subs, models) for k, v in m.named_parameters()}
    heads = [None] * len(models)
    if options.get("projection_dim"):
        state = load_file(folder / "model/pooler.safetensors")
        heads = [torch.nn.Linear(state[f"linear_{s}.weight"].shape[1], options["projection_dim"]) for s in "qp"]
        for s, head in zip("qp", heads):
            head.load_state_dict({k: state[f"linear_{s}.{k}"] for k in ("weight", "bias")})
            head.to(dtype)
            named |= {f"linear_{s}.{k}": v for k, v in head.named_parameters()}
    style = (options.get("pooling", "cls"),)
    embed = lambda i, side: losses.sentence_embedding(
        models[i], batch[f"{side}.input_ids"], batch[f"{side}.attention_mask"], *style, heads[i], options.get("normalize", False)
    )
    wide = torch.promote_types(dtype, torch.float32)
    q, p = embed(0, "query").to(wide), embed(-1, "passage").to(wide)
    teacher = batch.get("teacher_score")
    out = losses.contrastive(q, p, options.get("temperature", 1.0), teacher, options.get("contrastive_loss_weight", 1.0))
    return out | {"query_embeddings": q, "passage_embeddings": p}, named


def spread(folder, options, batch):
    """Mean over the queries of how far their losses are off in bf16, in parts of the mean loss."""
    means = []
    for dtype in (torch.float64, torch.bfloat16):
        if options["objective"] == "cross-encoder":
            ranker = model(BertForSequenceClassification, folder / "model", dtype)
            with torch.no_grad():
                scores = ranker(**batch).logits.double().view(-1, options["group_size"])
            means.append(-scores.log_softmax(-1)[:, 0])
            continue
        with torch.no_grad():
            out, _ = finetuned(folder, options, batch, dtype)
        scores = out["query_embeddings"].double() @ out["passage_embeddings"].double().T / options.get("temperature", 1.0)
        own = torch.arange(scores.size(0)) * options["group_size"]
        means.append(F.cross_entropy(scores, own, reduction="none"))
    return ((means[1] - means[0]).abs().mean() / means[0].mean()).item()


def dupmae(lm, decoder, batch, weight):
    """`losses.dupmae`, with losses that are not rounded: logits are f32 from bf16 products."""
    head = lm.cls.forward
    lm.cls.forward = lambda hidden: head(hidden).float()
    wide = {**batch, "bag_word_weight": batch["bag_word_weight"].float()}
    return losses.dupmae(lm, decoder, wide, weight)


def case(folder):
    batch = load_file(folder / "batch.safetensors")
    options = json.loads((folder / "case.json").read_text())
    objective = options["objective"]
    if objective in ("contrastive", "cross-encoder"):
        out, named = finetuned(folder, options, batch)
    else:
        lm = model(BertForMaskedLM, folder / "model", torch.bfloat16)
        config, named = lm.config, dict(lm.named_parameters())
    if objective in ("retromae", "dupmae"):
        decoder = losses.EnhancedDecoder(config).eval()
        state = load_file(folder / "model/enhanced_decoder.safetensors")
        decoder.load_state_dict({k.removeprefix("c_head."): v for k, v in state.items()})
        decoder = decoder.to(torch.bfloat16)
        named |= {f"c_head.{k}": v for k, v in decoder.named_parameters()}
        if objective == "dupmae":
            out = dupmae(lm, decoder, batch, options["bow_loss_weight"])
        else:
            out = losses.retromae(lm, decoder, batch)
    elif objective == "mlm":
        hidden = lm.bert(batch["encoder_input_ids"], attention_mask=batch["encoder_attention_mask"]).last_hidden_state
        out = {"loss": losses.token_loss(lm, hidden, batch["encoder_labels"])}
    out["loss"].backward()
    got = {k: v.detach() for k, v in out.items()} | {f"grad.{k}": v.grad for k, v in named.items() if v.grad is not None}
    expected = load_file(folder / "expected.safetensors")
    error = lambda name: ((got[name].double() - expected[name].double()).norm() / expected[name].double().norm()).item()
    errors = {name: error(name) for name in sorted(expected)}
    if objective in ("contrastive", "cross-encoder"):
        errors |= {name: max(e, spread(folder, options, batch)) for name, e in errors.items() if name.startswith("loss")}
    errors = {name: float(f"{e:.3e}") for name, e in errors.items()}
    (folder / "plain_bf16.json").write_text(json.dumps(errors, indent=1) + "\n")
    gradients = sorted(e for name, e in errors.items() if name.startswith("grad.") and "key.bias" not in name)
    print(folder, "loss", errors["loss"], "gradients", gradients[0], "to", gradients[-1])


for name in sys.argv[2:]:
    case(pathlib.Path(name))
