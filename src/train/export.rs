//! A checkpoint of a run made a model that others load: at the end of `train`, and on demand.
//!
//! Everything comes from the folder of the run: weights from the checkpoint, one tensor at a time; configuration, tokenizer and
//! pooler from what the run kept of its [`origin`]. So the same checkpoint gives the same model at any time, with the
//! data and the starting model long gone, while the run goes on, and after it was killed while it exported.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::files::Disk;
use crate::model::element::Dtype;
use crate::model::export::{ExportKind, ExportSpec, export_on};
use crate::model::names;
use crate::model::parameters::Parameters;
use crate::model::safetensors::SafeTensors;
use crate::model::tensor_file::TensorFile;
use crate::train::checkpoint::{Checkpoint, LOSS, Opened, State, WEIGHTS};
use crate::train::origin::{self, About, Kept, Purpose};
use crate::train::store::{self, Store};

/// What to export, and where to.
#[derive(Clone, Debug)]
pub struct Request {
    /// Folder of the run.
    pub run: PathBuf,
    /// Folder to write.
    pub output: PathBuf,
    /// Checkpoint to export; the newest good one of the run when absent.
    pub checkpoint: Option<PathBuf>,
    /// Element type of the weights: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Largest file of weights; beyond it they are split.
    pub max_shard_bytes: u64,
    /// Whether an earlier export of the same name is replaced.
    pub overwrite: bool,
}

impl Request {
    /// The usual choices: the newest good checkpoint, f32, 5 GB a file, an existing folder is left alone.
    pub fn new(run: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Request {
            run: run.into(),
            output: output.into(),
            checkpoint: None,
            dtype: Dtype::F32,
            max_shard_bytes: 5_000_000_000,
            overwrite: false,
        }
    }
}

/// Exports a checkpoint and returns it. `warn` takes a line for every damaged checkpoint passed over.
///
/// # Errors
/// No run, no good checkpoint, a checkpoint of another model, an output that exists, or a failure of the system; nothing is then
/// left behind, and nothing of the run is changed.
pub fn export_run(disk: &Disk, request: &Request, warn: &mut dyn FnMut(String)) -> Result<Checkpoint> {
    let run = &request.run;
    if !run.join(store::DIR).is_dir() {
        return Err(Error::refused("is not the folder of a run")
            .path(run)
            .remedy("give the folder that train --output named"));
    }
    let origin = origin::open(disk, run)?;
    let checkpoint = match &request.checkpoint {
        Some(dir) => match Checkpoint::open(disk, dir)? {
            Opened::Good(checkpoint) => *checkpoint,
            Opened::Damaged(e) => return Err(e),
        },
        None => newest(disk, run, warn)?,
    };
    check_same(&origin, &checkpoint, warn)?;

    // By the engine's own names, which those of a bi-encoder's checkpoint are and those of published models are not.
    let weights = SafeTensors::open(checkpoint.dir.join(WEIGHTS))?;
    let mut spec = ExportSpec::new(origin.config.clone(), kind(&origin.about.purpose), &origin.dir);
    match &origin.about.purpose {
        Purpose::Pretrain => spec.enhanced_decoder = weights.has_all(&names::enhanced_decoder(&origin.config)),
        Purpose::BiEncoder { prompts, max_length, .. } => {
            spec.prompts = prompts.clone();
            spec.max_seq_length = (*max_length).min(spec.max_seq_length);
        }
        Purpose::CrossEncoder { max_length } => spec.max_seq_length = (*max_length).min(spec.max_seq_length),
    }
    spec.dtype = request.dtype;
    spec.max_shard_bytes = request.max_shard_bytes;
    spec.replace = request.overwrite;
    spec.pooler = origin.pooler.is_some();
    spec.base_model = origin.about.base_model.clone();
    spec.provenance = provenance(&checkpoint.state);
    export_on(disk, &spec, &request.output, &mut |name, values| {
        let from = match &origin.pooler {
            Some(pooler) if pooler.find(name).is_some() => pooler,
            _ => &weights,
        };
        let missing = || {
            Error::refused("the model has no such parameter")
                .path(from.path())
                .tensor(name)
                .remedy("give a checkpoint of this run")
        };
        let shape = from.find(name).ok_or_else(missing)?;
        values.resize(shape.iter().product(), 0.0);
        from.read_f32(name, &shape, values)
    })?;
    Ok(checkpoint)
}

/// What is exported of a run with this purpose.
fn kind(purpose: &Purpose) -> ExportKind {
    match *purpose {
        Purpose::Pretrain => ExportKind::MaskedLm,
        Purpose::BiEncoder { pooling, normalize, projection, lexical, untied, .. } => {
            ExportKind::BiEncoder { pooling, normalize, projection, lexical: lexical.is_some(), untied }
        }
        Purpose::CrossEncoder { .. } => ExportKind::CrossEncoder,
    }
}

fn newest(disk: &Disk, run: &Path, warn: &mut dyn FnMut(String)) -> Result<Checkpoint> {
    // The run may be going on in another process: its folder is only looked at.
    let (checkpoint, damaged) = Store::new(disk, run, 1).look()?;
    let checkpoint = checkpoint.ok_or_else(|| {
        Error::refused("nothing was saved here yet").path(run).remedy("let train save a checkpoint first")
    })?;
    for (_, error) in damaged {
        warn(format!("{error}; exporting {} instead", checkpoint.dir.display()));
    }
    Ok(checkpoint)
}

/// A checkpoint of another run may have the same shapes and another vocabulary.
fn check_same(origin: &Kept, checkpoint: &Checkpoint, warn: &mut dyn FnMut(String)) -> Result<()> {
    let settings = &checkpoint.state.settings;
    let About { model, data, .. } = &origin.about;
    let of = |key: &str| settings.get(key).map_or("unset", String::as_str);
    if of("model") != model {
        let cause = format!("is of the model {}, the run is of {model}", of("model"));
        return Err(Error::refused(cause).path(&checkpoint.dir).remedy("give the --run that it belongs to"));
    }
    if of("data") != data {
        warn(format!(
            "{}: was trained on {}, the tokenizer of the run is that of {data}",
            checkpoint.dir.display(),
            of("data")
        ));
    }
    Ok(())
}

/// What the model card and the manifest say of the run.
fn provenance(state: &State) -> Map<String, Value> {
    let mut map = Map::new();
    // Settings are kept as TOML text, whose strings and numbers are those of JSON.
    let setting = |key: &str| {
        let text = state.settings.get(key)?;
        Some(serde_json::from_str(text).unwrap_or_else(|_| json!(text)))
    };
    let mut put = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            map.insert(key.into(), value);
        }
    };
    put("objective", setting("objective"));
    put("steps", Some(json!(state.step)));
    put("texts seen", Some(json!(state.sequences)));
    put("tokens seen", Some(json!(state.tokens)));
    put("learning rate", setting("learning-rate"));
    put("seed", Some(json!(state.seed)));
    put("data", setting("data"));
    put("engine", Some(json!(state.engine)));
    if let Some(best) = &state.best {
        let name =
            if best.metric == LOSS { "lowest held-out loss".into() } else { format!("best dev {}", best.metric) };
        put(&name, Some(json!(best.value)));
    }
    map
}
