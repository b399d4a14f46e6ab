//! The model folder of a bi-encoder: an encoder for both sides, or one each in `query_model` and `passage_model`, and projections.
//!
//! A projection is the `2_Dense` of a SentenceTransformer, as this engine and that library write it, or in `pooler.safetensors`, as the
//! published trainer does. What else a folder says is in [`SentenceSettings`].

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config::BertConfig;
use super::names;
use super::parameters::Parameters;
use super::sentence::{Modules, SentenceSettings, object};
use super::tensor_file::TensorFile;
use super::weights::{self, Checkpoint};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Folders of the encoders where there are two, in the engine's order; their parameters' names begin with these.
pub const SIDES: [&str; 2] = ["query_model", "passage_model"];
/// Names of the projections of two encoders, and of the one that both sides share.
pub const PROJECTIONS: [&str; 2] = ["linear_q", "linear_p"];
/// See [`PROJECTIONS`].
pub const PROJECTION: &str = "linear";
const POOLER: &str = "pooler.safetensors";

/// An opened and checked folder.
#[derive(Debug)]
pub struct Towers {
    /// The configuration, equal on both sides.
    pub config: BertConfig,
    /// Width of the projections, where there are some.
    pub projection: Option<usize>,
    /// What the folder says of pooling, normalisation, prompts and lengths.
    pub settings: SentenceSettings,
    /// One, or those of [`SIDES`].
    encoders: Vec<Checkpoint>,
    /// As many, or none.
    heads: Vec<Head>,
    /// Where the tokenizer may be.
    folders: Vec<PathBuf>,
}

/// The projection of an encoder.
#[derive(Debug)]
struct Head {
    /// As the engine calls it.
    name: &'static str,
    file: Box<dyn TensorFile>,
    /// As the file calls it.
    stem: &'static str,
    /// Whether the file has a bias; without one it is zero.
    bias: bool,
    width: usize,
}

impl Towers {
    /// Opens `path`: the folder of a bi-encoder or a SentenceTransformer, or a single encoder's folder or file of weights.
    ///
    /// # Errors
    /// A missing or malformed file, weights that do not fit the configuration, or a computation that the engine does not have.
    pub fn open(path: &Path) -> Result<Towers> {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        let sides: Vec<_> = SIDES.iter().map(|side| folder.join(side)).filter(|side| side.is_dir()).collect();
        if let [side] = &sides[..] {
            let other = SIDES.iter().find(|side| !folder.join(side).is_dir()).unwrap_or(&SIDES[0]);
            return Err(Error::refused(format!("there is {} and no {other}", side.display()))
                .path(folder)
                .remedy("give a folder with both, or with one encoder"));
        }
        let untied = !sides.is_empty();
        let places = if untied { sides } else { vec![folder.to_path_buf()] };
        let modules = places.iter().map(|place| Modules::read(place)).collect::<Result<Vec<_>>>()?;
        let encoders = match modules.iter().any(|m| m.transformer.as_path() != folder) {
            true => modules.iter().map(|m| Checkpoint::open(&m.transformer)).collect::<Result<Vec<_>>>()?,
            // A file of weights may have been named.
            false => vec![Checkpoint::open(path)?],
        };
        let configs: Vec<_> = modules.iter().map(|m| m.transformer.join("config.json")).collect();
        let config = BertConfig::read(&configs[0])?;
        for other in &configs[1..] {
            if names::encoder(&BertConfig::read(other)?) != names::encoder(&config) {
                return Err(Error::refused(format!("differs in size from {}", configs[0].display()))
                    .path(other)
                    .remedy("use two encoders of one size"));
            }
        }
        encoders.iter().try_for_each(|weights| weights.check(&names::encoder(&config)))?;
        let heads = heads(folder, &modules, &config)?;
        let mut folders = vec![folder.to_path_buf()];
        let mut settings = None;
        for (module, place) in modules.into_iter().zip(&places) {
            folders.push(module.transformer);
            settings = Some(match settings {
                None => module.settings,
                Some(first) => SentenceSettings::joined(first, module.settings, place)?,
            });
        }
        let (projection, settings) = (heads.first().map(|head| head.width), settings.unwrap_or_default());
        Ok(Towers { config, projection, settings, encoders, heads, folders })
    }

    /// Whether queries and passages have an encoder each.
    pub fn untied(&self) -> bool {
        self.encoders.len() == 2
    }

    /// Refuses encoder number `side` (of one or two) if it has no MLM head, or one that does not fit the configuration.
    ///
    /// # Errors
    /// The head, or some of it, is missing.
    pub fn require_mlm_head(&self, side: usize) -> Result<()> {
        let weights = &self.encoders[side.min(self.encoders.len() - 1)];
        let head = names::mlm_head(&self.config);
        if head.iter().any(|param| weights.contains(&param.name)) {
            return weights.check(&head);
        }
        Err(Error::refused("holds no MLM head: no cls.predictions.*, which a lexical representation is made with")
            .path(weights.file())
            .remedy("give a model that still has the head it was pre-trained with, or use --representation cls"))
    }

    /// The folder of the model's tokenizer, where it came with one.
    pub fn tokenizer(&self) -> Option<&Path> {
        self.folders.iter().map(PathBuf::as_path).find(|folder| Tokenizer::is_at(folder))
    }

    /// Reads the parameter that the engine calls `name`; false when the folder has none of that name.
    ///
    /// # Errors
    /// Another shape, no float, a value that is not finite, or a failed read.
    pub fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool> {
        if let Some((head, part)) = self.head(name) {
            if part == "bias" && !head.bias {
                out.fill(0.0);
                return Ok(true);
            }
            return head.file.read_f32(&format!("{}.{part}", head.stem), shape, out).map(|()| true);
        }
        match self.encoder(name) {
            Some((weights, bare)) => weights.read_f32(bare, shape, out).map(|()| true),
            None => Ok(false),
        }
    }

    /// The projection that `name` is a part of, and which part.
    fn head<'n>(&self, name: &'n str) -> Option<(&Head, &'n str)> {
        self.heads.iter().find_map(|head| {
            let part = name.strip_prefix(head.name)?.strip_prefix('.')?;
            matches!(part, "weight" | "bias").then_some((head, part))
        })
    }

    /// The encoder that has the parameter `name`, and what it is called there.
    fn encoder<'n>(&self, name: &'n str) -> Option<(&Checkpoint, &'n str)> {
        let side = SIDES.iter().position(|side| name.starts_with(side)).unwrap_or(0);
        let bare = SIDES.iter().find_map(|side| name.strip_prefix(side)?.strip_prefix('.')).unwrap_or(name);
        self.encoders.get(side).filter(|weights| weights.contains(bare)).map(|weights| (weights, bare))
    }
}

impl Parameters for Towers {
    fn find(&self, name: &str) -> Option<Vec<usize>> {
        match self.head(name) {
            Some((head, "bias")) => Some(vec![head.width]),
            Some((head, _)) => Some(vec![head.width, self.config.hidden_size]),
            None => self.encoder(name).and_then(|(weights, bare)| weights.shape(bare)),
        }
    }

    fn read(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool> {
        Towers::read(self, name, shape, out)
    }
}

/// The projections, one an encoder or none.
fn heads(folder: &Path, modules: &[Modules], config: &BertConfig) -> Result<Vec<Head>> {
    let untied = modules.len() == 2;
    let names: &[&'static str] = if untied { &PROJECTIONS } else { &[PROJECTION] };
    let refuse = |cause: &str, remedy: &str| Err(Error::refused(cause).path(folder).remedy(remedy));
    let dense: Vec<&PathBuf> = modules.iter().filter_map(|m| m.dense.as_ref()).collect();
    let pooler = folder.join(POOLER);
    let heads = match (pooler.is_file(), dense.len()) {
        (false, 0) => return Ok(Vec::new()),
        (true, 0) => {
            let open = |&name: &&'static str| Head::open(name, weights::open_file(&pooler)?, name, true, config);
            names.iter().map(open).collect::<Result<Vec<_>>>()?
        }
        (false, n) if n == modules.len() => {
            let open = |(&name, &place): (&&'static str, &&PathBuf)| Head::dense(name, place, config);
            names.iter().zip(&dense).map(open).collect::<Result<Vec<_>>>()?
        }
        (true, _) => return refuse("has a Dense module and pooler.safetensors", "remove the one that is not in use"),
        (false, _) => return refuse("one of the encoders has a projection and the other has none", SAME),
    };
    if heads.windows(2).any(|two| two[0].width != two[1].width) {
        return refuse("the projections differ in width", SAME);
    }
    Ok(heads)
}

const SAME: &str = "use two encoders of one size";

impl Head {
    /// The projection `stem` in `file`, its shapes checked.
    fn open(
        name: &'static str,
        file: Box<dyn TensorFile>,
        stem: &'static str,
        bias: bool,
        config: &BertConfig,
    ) -> Result<Head> {
        let first = file.require(&format!("{stem}.weight"))?.shape;
        let parts = [("weight", first.clone()), ("bias", first.first().copied().into_iter().collect())];
        for (part, expected) in &parts[..1 + usize::from(bias)] {
            let tensor = format!("{stem}.{part}");
            let shape = file.require(&tensor)?.shape;
            if shape != *expected || first.len() != 2 || first[0] == 0 || first[1] != config.hidden_size {
                let cause = format!("has shape {shape:?}; a projection of this model is [N, {}]", config.hidden_size);
                let remedy = "give the model's own projection";
                return Err(Error::refused(cause).path(file.path()).tensor(tensor).remedy(remedy));
            }
        }
        Ok(Head { name, file, stem, bias, width: first[0] })
    }

    /// The Dense module in the folder `place`.
    fn dense(name: &'static str, place: &Path, config: &BertConfig) -> Result<Head> {
        let path = place.join("config.json");
        let keys = object(&path)?;
        let refuse = |cause: String| {
            Err(Error::refused(cause).path(&path).remedy("use a model whose Dense is one linear layer, or has none"))
        };
        if let Some(activation) = keys.get("activation_function").filter(|value| !value.is_null())
            && activation.as_str().and_then(|class| class.rsplit('.').next()) != Some("Identity")
        {
            return refuse(format!(
                "the activation function {activation} is none that the engine has after a projection"
            ));
        }
        // Newer versions can have the module work on something else than the pooled embedding.
        for key in ["module_input_name", "module_output_name"] {
            if let Some(value) = keys.get(key).filter(|v| !v.is_null() && v.as_str() != Some("sentence_embedding")) {
                return refuse(format!("{key} is {value}"));
            }
        }
        let file = weights::open_file(&weights::find_weights(place)?)?;
        let bias = keys.get("bias") != Some(&Value::Bool(false));
        Head::open(name, file, "linear", bias, config)
    }
}
