//! What both fine-tuning objectives begin with: queries, passages and what belongs to what, tokenized as the model expects.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::data::masking::LONGEST_TEXT;
use crate::data::order::Part;
use crate::data::pairs::files::{PairFiles, from_files, same_tokenizer};
use crate::data::pairs::groups::Groups;
use crate::data::pairs::negatives::SystemRules;
use crate::data::pairs::rows::{RowRules, from_rows};
use crate::data::pairs::texts::TextRules;
use crate::data::pairs::{Pairs, PairsSettings, Side};
use crate::data::shard::{ShardSet, TitleSep};
use crate::data::source;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files::hex16;
use crate::model::config::BertConfig;
use crate::train::settings::Settings;

/// The data of a fine-tuning run.
pub(super) struct PairData {
    pub pairs: Arc<Pairs>,
    pub tokenizer: Tokenizer,
    /// Where it comes from.
    folder: PathBuf,
    /// In words.
    pub words: String,
    pub fingerprint: String,
}

impl PairData {
    /// Opens what `settings` name. `model` is the folder of the model, where it has a tokenizer.
    pub fn open(settings: &Settings, model: Option<&Path>, notes: &mut Vec<String>) -> Result<PairData> {
        let rules = PairsSettings {
            group: settings.group_size.unwrap_or(1),
            depth: settings.negatives_depth.unwrap_or(usize::MAX),
            missing_score: settings.missing_teacher.unwrap_or_default(),
        };
        if let Some(rows) = settings.data.as_deref().filter(|rows| ShardSet::is_set(rows)) {
            return Err(Error::usage("holds shards, not rows of queries and passages")
                .path(rows)
                .remedy("give it as --queries or --corpus, or name files of rows"));
        }
        let corpus = settings.corpus.as_deref().map(|dir| ShardSet::open(dir).map(Arc::new)).transpose()?;
        let queries = settings.queries.as_deref().map(|dir| ShardSet::open(dir).map(Arc::new)).transpose()?;
        let sets: Vec<&Arc<ShardSet>> = queries.iter().chain(&corpus).collect();
        let folder = settings.tokenizer.as_deref().or(model).or(sets.first().map(|set| set.dir()));
        let folder = folder.ok_or_else(|| {
            Error::usage("there is no tokenizer beside the model").remedy("give --tokenizer, that of the model")
        })?;
        let tokenizer = Tokenizer::load(folder)?;
        for set in sets.iter().filter(|set| set.dir() != folder) {
            same_tokenizer((&tokenizer, folder), set, notes)?;
        }
        let folder = folder.to_path_buf();
        let mut sha = Sha256::new();
        for set in &sets {
            sha.update(set.description()?);
        }
        let pairs = match (&settings.data, queries, corpus) {
            (Some(rows), _, corpus) => from_settings_rows(settings, rows, &tokenizer, corpus, rules)?,
            (None, Some(queries), Some(passages)) => from_files(queries, passages, &files(settings)?, rules, None)?,
            _ => {
                return Err(Error::usage("--queries and --corpus are missing").remedy("give both, or --data with rows"));
            }
        };
        if settings.data.is_some() {
            for side in [pairs.queries(), pairs.passages()] {
                digest_texts(&mut sha, side)?;
            }
        }
        sha.update(pairs.digest());
        let findings = pairs.findings();
        notes.extend(findings.lines());
        let words = format!("{} of {} queries, {} passages", findings.trained, findings.queries, findings.passages);
        Ok(PairData { pairs: Arc::new(pairs), tokenizer, folder, words, fingerprint: hex16(&sha.finalize()) })
    }

    /// The rules of a side: cut to `length`, which the model bounds, after `prefix`.
    pub fn rules(
        &self,
        what: &str,
        length: Option<usize>,
        prefix: Option<&str>,
        config: &BertConfig,
        notes: &mut Vec<String>,
    ) -> Result<TextRules> {
        let most = config.max_position_embeddings.min(LONGEST_TEXT);
        let asked = length.unwrap_or(most);
        if asked > most {
            notes.push(format!("{what} of up to {asked} tokens are cut to the {most} positions of the model"));
        }
        Ok(TextRules { max_length: asked.min(most), prefix: self.tokenizer.ids(prefix.unwrap_or_default())? })
    }

    /// Refuses sets whose tokens mean others to the model.
    pub fn same_tokenizer(&self, sets: &[&ShardSet], notes: &mut Vec<String>) -> Result<()> {
        let model = (&self.tokenizer, self.folder.as_path());
        sets.iter().filter(|set| set.dir() != self.folder).try_for_each(|set| same_tokenizer(model, set, notes))
    }

    /// What a checkpoint needs of the tokenizer.
    pub fn tokenizer_files(&self) -> Vec<(String, Vec<u8>)> {
        self.tokenizer.files().to_vec()
    }
}

fn files(settings: &Settings) -> Result<PairFiles> {
    let systems = SystemRules::default();
    Ok(PairFiles {
        qrels: source::expand(&settings.qrels)?,
        qrels_format: settings.qrels_format,
        least_grade: settings.least_grade.unwrap_or(1),
        negatives: source::expand(&settings.negatives)?,
        systems: SystemRules {
            margin: settings.ce_margin.map_or(systems.margin, |x| x as f32),
            per_system: settings.per_system.unwrap_or(systems.per_system),
            systems: settings.systems.clone(),
        },
        teacher: source::expand(&settings.teacher_scores)?,
    })
}

fn from_settings_rows(
    settings: &Settings,
    rows: &Path,
    tokenizer: &Tokenizer,
    corpus: Option<Arc<ShardSet>>,
    pairs: PairsSettings,
) -> Result<Pairs> {
    let longest = settings.max_length.map_or(LONGEST_TEXT, |n| n as usize);
    let rules = RowRules {
        format: settings.row_format,
        title_sep: settings.title_sep.unwrap_or(TitleSep::Space),
        query_length: settings.query_length.unwrap_or(longest).min(LONGEST_TEXT),
        passage_length: settings.passage_length.unwrap_or(longest).min(LONGEST_TEXT),
    };
    from_rows(&source::expand(&[rows.to_string_lossy().into_owned()])?, tokenizer, corpus, &rules, pairs)
}

fn digest_texts(sha: &mut Sha256, side: &Side) -> Result<()> {
    let (mut ids, mut starts) = (Vec::new(), Vec::new());
    for text in 0..side.corpus.texts() {
        side.corpus.read(text, &mut ids, &mut starts)?;
        sha.update((ids.len() as u64).to_le_bytes());
        sha.update(bytemuck::cast_slice(&ids));
    }
    Ok(())
}

/// Groups looked at to know how long texts are.
const LOOKED_AT: u64 = 256;

/// Tokens of an epoch, about, by the length of a query and of a member of its group.
pub(super) fn tokens(groups: &Groups, length: impl Fn(u32, &[u32]) -> Result<usize>) -> Result<u64> {
    let queries = groups.order().texts(Part::Train);
    let looked_at = queries.clamp(1, LOOKED_AT);
    let mut sum = 0;
    for i in 0..looked_at {
        let group = groups.group(i * queries / looked_at)?;
        sum += length(group.query, &group.passages)?;
    }
    Ok((sum as f64 * queries as f64 / looked_at as f64) as u64)
}
