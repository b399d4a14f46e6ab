//! `step`: one forward and backward on exactly the given inputs, for comparison with PyTorch from outside.

use std::path::PathBuf;

use serde_json::json;

use super::{Global, Hardware, say};
use crate::error::{Error, Result};
use crate::graph::{Capacity, StepDropout};
use crate::model::config::BertConfig;
use crate::model::weights::Checkpoint;
use crate::model::{hub, names};
use crate::train::contract::{BatchFile, write_gradients};
use crate::train::settings::Objective;
use crate::train::step::{self, Pretrainer};
use crate::train::target::Target;

/// Loss and every gradient of one batch, without dropout
///
/// The batch is a safetensors file of integers: encoder_input_ids, encoder_attention_mask, encoder_labels (all [B, L], -100 = no
/// label) and for retromae decoder_input_ids, decoder_labels ([B, L]), decoder_attention_mask ([B, L, L], 1 = visible). The output
/// holds loss, loss.<part> and grad.<parameter> under checkpoint names.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// What is minimised
    #[arg(long, value_enum)]
    objective: Objective,
    /// Model: a folder, a file of weights, or a hub name that is in the local Hugging Face cache
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Inputs
    #[arg(long, value_name = "FILE")]
    batch: PathBuf,
    /// Where the losses and gradients go; must not exist
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    hardware: Hardware,
}

/// Runs the subcommand.
pub fn run(args: Arguments, global: &Global) -> Result<()> {
    if args.output.exists() {
        return Err(Error::refused("exists already").path(&args.output).remedy("remove it or choose another --output"));
    }
    let path = hub::resolve(&args.model)?;
    let folder = if path.is_dir() { path.clone() } else { path.parent().map(PathBuf::from).unwrap_or_default() };
    let config = BertConfig::read(folder.join("config.json"))?;
    let weights = Checkpoint::open(&path)?;
    let objective: step::Objective = args.objective.into();
    let with_decoder = objective == step::Objective::RetroMae;
    let mut expected = names::encoder(&config);
    expected.extend(names::mlm_head(&config));
    if with_decoder {
        expected.extend(names::enhanced_decoder(&config));
    }
    weights.check(&expected)?;
    let batch = BatchFile::open(&args.batch, "")?;
    let batch = batch.pretrain(with_decoder, config.vocab_size, config.max_position_embeddings)?;
    let capacity = Capacity {
        tokens: batch.tokens(),
        sequences: batch.sequences(),
        length: batch.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0),
        encoder_labels: batch.encoder_label_ids.len(),
    };
    let target = Target::open(&args.hardware.device, args.hardware.precision)?;
    target.note.iter().for_each(|note| global.note(note));
    let mut model = Pretrainer::new(target.device, &config, objective, capacity, target.storage)?;
    model.params().load(0, 0.0, |name, shape, out| weights.read_f32(name, shape, out).map(|()| true))?;
    let losses = model.gradients(&[batch], StepDropout::OFF)?;
    let mut parts = vec![("loss", losses.total())];
    if with_decoder {
        parts.extend([("loss.encoder", losses.encoder_loss()), ("loss.decoder", losses.decoder_loss())]);
    }
    write_gradients(&args.output, model.params(), &parts, str::to_string)?;
    let mut result = json!({ "loss": losses.total() });
    say(&format!("loss          {:.7}", losses.total()))?;
    if with_decoder {
        let (encoder, decoder) = (losses.encoder_loss(), losses.decoder_loss());
        say(&format!("loss.encoder  {encoder:.7}\nloss.decoder  {decoder:.7}"))?;
        result = json!({ "loss": losses.total(), "loss.encoder": encoder, "loss.decoder": decoder });
    }
    say(&format!("{} gradients in {}", model.params().parts().len(), args.output.display()))?;
    global.write_json(&result)
}
