//! The model card (`README.md`) of an exported folder: what the model is, how to load it, and where it comes from.

use super::export::{ExportKind, ExportSpec};
use super::hub::is_hub_name;
use super::towers::SIDES;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

/// The card of the encoder in the folder `target`.
pub(super) fn render(spec: &ExportSpec, target: &Path) -> String {
    let name = name_of(target);
    page(spec, &name, &usage(spec, &quoted(&name)))
}

/// The card of the folder `target` of two encoders.
pub(super) fn of_two(spec: &ExportSpec, target: &Path) -> String {
    let name = name_of(target);
    let [queries, passages] = SIDES.map(|side| format!("{}/{side}", quoted(&name)));
    let usage = format!(
        "from sentence_transformers import SentenceTransformer\n\nqueries = SentenceTransformer(\"{queries}\")\n\
         passages = SentenceTransformer(\"{passages}\")\n\
         print(queries.similarity(queries.encode([\"a query\"]), passages.encode([\"a passage\"])))\n"
    );
    page(spec, &name, &usage)
}

/// The name of a folder as a card shows it.
fn name_of(target: &Path) -> String {
    let name = target.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    name.chars().filter(|c| !c.is_control()).collect()
}

/// Text inside a Python string: a quote or backslash in a folder's name must not break out of it.
fn quoted(name: &str) -> String {
    name.replace('\\', "\\\\").replace('"', "\\\"")
}

fn page(spec: &ExportSpec, name: &str, usage: &str) -> String {
    let (what, task, library, tag) = match spec.kind {
        ExportKind::MaskedLm => match spec.provenance.get("objective").and_then(|objective| objective.as_str()) {
            Some("dupmae") => ("DupMAE pre-trained encoder", "fill-mask", "transformers", "dupmae"),
            _ => ("RetroMAE pre-trained encoder", "fill-mask", "transformers", "retromae"),
        },
        ExportKind::BiEncoder { .. } => {
            ("Text embedding model", "sentence-similarity", "sentence-transformers", "feature-extraction")
        }
        ExportKind::CrossEncoder => ("Reranker", "text-ranking", "sentence-transformers", "cross-encoder"),
    };
    let mut card =
        format!("---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- bert\n- {tag}\n- retromae-engine\n");
    if let Some(base) = spec.base_model.as_deref().filter(|base| is_hub_name(base)) {
        let _ = writeln!(card, "base_model: {base}");
    }
    let c = &spec.config;
    let _ = write!(
        card,
        "---\n\n# {name}\n\n{what}: BERT with {} layers, hidden size {}, {} heads, vocabulary of {} tokens, inputs of up to {} tokens.\n",
        c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.vocab_size, spec.max_seq_length,
    );
    card.push_str("\n## Use\n\n```python\n");
    card.push_str(usage);
    card.push_str("```\n\n## Training\n\nTrained with retromae-engine. The whole record is in `retromae_run.json`.\n");
    let facts: Vec<String> = spec
        .provenance
        .iter()
        .filter_map(|(key, value)| Some(format!("| {} | {} |\n", cell(key), cell(&plain(value)?))))
        .collect();
    if !facts.is_empty() {
        card.push_str("\n| | |\n| --- | --- |\n");
        facts.iter().for_each(|row| card.push_str(row));
    }
    card
}

fn usage(spec: &ExportSpec, name: &str) -> String {
    let sentence = format!(
        "from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer(\"{name}\")\n\
         embeddings = model.encode([\"a query\", \"a passage\"])\nprint(model.similarity(embeddings[:1], embeddings[1:]))\n"
    );
    match spec.kind {
        ExportKind::MaskedLm => format!(
            "from transformers import AutoModelForMaskedLM, AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained(\"{name}\")\n\
             model = AutoModelForMaskedLM.from_pretrained(\"{name}\")\n\n\
             # or, with the state of the first token as the embedding:\n{sentence}"
        ),
        ExportKind::BiEncoder { .. } => sentence,
        ExportKind::CrossEncoder => {
            // The tokenizer's files may name another length: they are the source's own.
            let longest = match spec.max_seq_length {
                n if n < spec.config.max_position_embeddings => format!(", max_length={n}"),
                _ => String::new(),
            };
            format!(
                "from sentence_transformers import CrossEncoder\n\nmodel = CrossEncoder(\"{name}\"{longest})\n\
                 print(model.predict([(\"a query\", \"a passage\")]))\n"
            )
        }
    }
}

/// Strings, numbers and booleans; anything nested stays in the manifest.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

/// Text that cannot break the table.
fn cell(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().replace('|', "\\|")
}
