"""Loads exported model folders the way people do, and checks that every weight arrived.

    python load_export.py EXPORT_DIR … [--reference FILE.safetensors]

For each folder: the auto classes of transformers find no missing and no unexpected parameter (but for the pooler, which a model may
lack), every loaded parameter equals the file's, the tokenizer knows its longest input, and sentence-transformers encodes a text to the
embedding computed by hand from the hidden states. With --reference (one folder): `input_ids` and `attention_mask` [B, L], int64, and
`last_hidden_state` [B, L, C] as this engine computed it; the loaded model must agree to 1e-4 on the positions that are not padding.
Prints one line a folder, beginning with "ok"; exits with an error otherwise.
"""
import argparse
import json
import pathlib
import warnings

import safetensors.torch
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

warnings.filterwarnings("ignore")
TEXTS = ["a word1 b", "abc word2 word3 xyz"]


def stored(folder):
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors.update(safetensors.torch.load_file(path))
    return tensors


def load(auto, folder, tensors):
    """Loads with one auto class; returns the model and the number of parameters compared with the file."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    model.eval()
    missing = [k for k in info["missing_keys"] if "pooler." not in k]
    assert not missing, f"{auto.__name__}: missing {missing}"
    other_head = ("pooler.", "cls.", "classifier.") if auto is AutoModel else ("pooler.",)
    unexpected = [k for k in info["unexpected_keys"] if not any(p in k for p in other_head)]
    assert not unexpected, f"{auto.__name__}: unexpected {unexpected}"
    assert not info["mismatched_keys"], info["mismatched_keys"]
    compared = 0
    for name, value in model.state_dict().items():
        for spelling in (name, "bert." + name, name.removeprefix("bert.")):
            if spelling in tensors:
                assert value.dtype == tensors[spelling].dtype, (name, value.dtype)
                assert torch.equal(value, tensors[spelling]), f"{auto.__name__}: {name} differs"
                compared += 1
                break
    return model, compared


def sentence_check(folder, model, tokenizer):
    """SentenceTransformer's embeddings against the pooling that the folder declares, done by hand."""
    from sentence_transformers import SentenceTransformer

    st = SentenceTransformer(str(folder), device="cpu")
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    assert st.max_seq_length == json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    x = hidden[:, 0] if pooling["pooling_mode_cls_token"] else (hidden * mask).sum(1) / mask.sum(1)
    if (folder / "2_Dense").exists():
        dense = safetensors.torch.load_file(folder / "2_Dense/model.safetensors")
        x = x @ dense["linear.weight"].T + dense["linear.bias"]
    if any("Normalize" in m["type"] for m in json.loads((folder / "modules.json").read_text())):
        x = torch.nn.functional.normalize(x, dim=-1)
    got = st.encode(TEXTS, convert_to_tensor=True).float()
    assert got.shape == x.shape, (got.shape, x.shape)
    error = ((got - x).norm() / x.norm()).item()
    # A bf16 model rounds the pooled state itself once more.
    assert error <= (1e-2 if next(model.parameters()).dtype == torch.bfloat16 else 1e-5), error
    return st.similarity_fn_name, got.shape[1]


def reference_check(model, path):
    given = safetensors.torch.load_file(path)
    with torch.no_grad():
        hidden = model(given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    real = given["attention_mask"].bool()
    ours, theirs = given["last_hidden_state"][real], hidden.float()[real]
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error <= 1e-4, f"hidden states differ by {error}"
    return error


def check(folder, reference):
    config = json.loads((folder / "config.json").read_text())
    architecture = config["architectures"][0]
    tensors = stored(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length <= config["max_position_embeddings"], tokenizer.model_max_length
    assert tokenizer(TEXTS[0])["input_ids"][0] == tokenizer.cls_token_id
    said = [folder.name, architecture, config["dtype"], f"{len(tensors)} tensors"]
    if architecture == "BertForSequenceClassification":
        from sentence_transformers import CrossEncoder

        model, compared = load(AutoModelForSequenceClassification, folder, tensors)
        score = CrossEncoder(str(folder), device="cpu").predict([(TEXTS[0], TEXTS[1])])[0]
        with torch.no_grad():
            logit = model(**tokenizer([TEXTS[0]], [TEXTS[1]], return_tensors="pt")).logits.item()
        assert abs(score - logit) <= 1e-5, (score, logit)
        assert compared >= len(tensors), (compared, len(tensors))
        said.append("CrossEncoder gives the bare logit")
    else:
        if architecture == "BertForMaskedLM":
            lm, compared = load(AutoModelForMaskedLM, folder, tensors)
            assert compared >= len(tensors), (compared, len(tensors))
            words = lm.get_input_embeddings().weight
            assert torch.equal(lm.cls.predictions.decoder.weight, words)
            assert torch.equal(lm.cls.predictions.decoder.bias, tensors["cls.predictions.bias"])
            said.append("AutoModelForMaskedLM")
        model, compared = load(AutoModel, folder, tensors)
        encoder = [k for k in tensors if not k.startswith("cls.")]
        assert compared >= len(encoder), (compared, len(encoder))
        similarity, width = sentence_check(folder, model, tokenizer)
        said.append(f"AutoModel, SentenceTransformer {width} wide, {similarity}")
        if reference:
            said.append(f"hidden states within {reference_check(model, reference):.1e}")
    print("ok " + " | ".join(said))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--reference", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folders:
        check(folder, args.reference)


if __name__ == "__main__":
    main()
