//! The dev set of a fine-tuning run: queries with judgements, searched or reranked with the model as it is, as `search`, `rerank` and
//! `evaluate` would do it afterwards.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use crate::data::pairs::batch::PairTexts;
use crate::data::pairs::ids::IdIndex;
use crate::data::pairs::runs::Run;
use crate::data::pairs::texts::{Texts, by_length};
use crate::data::shard::ShardSet;
use crate::data::source;
use crate::error::{Error, Result};
use crate::eval::metrics::Metric;
use crate::eval::qrels::Qrels;
use crate::retrieve::joined::{Joined, Widths};
use crate::retrieve::representation::Embedded;
use crate::retrieve::topk::TopK;
use crate::rng::{Site, Stream};
use crate::train::biencoder::BiEncoder;
use crate::train::cross_encoder::Ranker;
use crate::train::settings::Settings;
use crate::train::trainer::Judge;
use crate::train::updates::Trainable;

/// What is reported of a dev set.
pub const METRICS: [Metric; 3] = [Metric::Mrr(10), Metric::Ndcg(10), Metric::Recall(100)];
/// Passages kept of each query: what the metrics look at, and one that may be the query itself.
const DEPTH: usize = 101;
/// Passages searched when nothing is said.
const SAMPLE: usize = 100_000;

/// A judged query.
struct DevQuery {
    /// The number of its text.
    query: u32,
    /// Its judged passages that are in the corpus, by number.
    grades: Vec<(u32, i32)>,
    /// All its grades.
    judged: Vec<i32>,
    /// The passage that has the query's own id, which does not count, as in BEIR.
    own: Option<u32>,
}

impl DevQuery {
    /// The figures of a list of passages.
    fn figures(&self, list: impl Iterator<Item = u32>) -> [f64; METRICS.len()] {
        let grade = |passage: u32| {
            let at = self.grades.binary_search_by_key(&passage, |&(number, _)| number);
            at.map_or(0, |at| self.grades[at].1)
        };
        let grades: Vec<i32> = list.filter(|&passage| Some(passage) != self.own).map(grade).collect();
        METRICS.map(|metric| metric.figure(&grades, self.judged.iter().copied()))
    }
}

/// Means over queries.
fn means(figures: impl ExactSizeIterator<Item = [f64; METRICS.len()]>) -> Vec<(Metric, f64)> {
    let count = figures.len().max(1) as f64;
    let sums = figures.fold([0.0; METRICS.len()], |sums, one| std::array::from_fn(|i| sums[i] + one[i]));
    METRICS.into_iter().zip(sums.map(|sum| sum / count)).collect()
}

/// Queries and passages of a dev set, and what is judged.
pub struct DevSet {
    /// Queries by text number.
    pub queries: Arc<ShardSet>,
    /// Passages by text number.
    pub passages: Arc<ShardSet>,
    judged: Vec<DevQuery>,
    query_ids: IdIndex,
    passage_ids: IdIndex,
    /// Lines worth telling a person.
    pub notes: Vec<String>,
}

impl DevSet {
    /// Opens the dev set of `settings`, if they name one.
    ///
    /// # Errors
    /// Files that cannot be read, or judgements of other queries.
    pub fn open(settings: &Settings) -> Result<Option<DevSet>> {
        let (Some(queries), Some(corpus)) =
            (&settings.dev_queries, settings.dev_corpus.as_ref().or(settings.corpus.as_ref()))
        else {
            return Ok(None);
        };
        let (queries, passages) = (Arc::new(ShardSet::open(queries)?), Arc::new(ShardSet::open(corpus)?));
        let index = |set: &Arc<ShardSet>| IdIndex::new(set.clone()).map_err(|e| e.path(set.dir()));
        let (query_ids, passage_ids) = (index(&queries)?, index(&passages)?);
        let mut qrels = Qrels::default();
        for input in source::expand(&settings.dev_qrels)? {
            let (one, _) = Qrels::read(&input, None)?;
            for (query, judged) in one.queries() {
                for (passage, grade) in judged {
                    qrels.insert(query, passage, *grade);
                }
            }
        }
        let own_ids_count = qrels.judges_own_ids();
        let (mut judged, mut unknown, mut absent, mut example) = (Vec::new(), 0u64, 0u64, None);
        for (id, passages) in qrels.queries() {
            let Some(query) = query_ids.find(id)? else {
                unknown += 1;
                example.get_or_insert(id);
                continue;
            };
            let mut grades = Vec::with_capacity(passages.len());
            for (passage, grade) in passages {
                match passage_ids.find(passage)? {
                    Some(number) => grades.push((number, *grade)),
                    None => absent += 1,
                }
            }
            grades.sort_unstable();
            let own = if own_ids_count { None } else { passage_ids.find(id)? };
            judged.push(DevQuery { query, grades, judged: passages.values().copied().collect(), own });
        }
        if judged.is_empty() {
            let first = queries.id(0)?.unwrap_or("none").to_owned();
            let cause = format!(
                "judges none of the dev set's queries: it names {}, the queries {first}",
                example.unwrap_or("none")
            );
            return Err(Error::refused(cause)
                .path(Path::new(settings.dev_qrels.first().map_or("", String::as_str)))
                .remedy("give the judgements of --dev-queries"));
        }
        let mut notes = Vec::new();
        if unknown > 0 {
            notes.push(format!("{unknown} judged queries of the dev set are not among its queries; left out"));
        }
        if absent > 0 {
            notes.push(format!("{absent} judged passages of the dev set are not in its corpus; they cannot be found"));
        }
        Ok(Some(DevSet { queries, passages, judged, query_ids, passage_ids, notes }))
    }

    /// For a bi-encoder, which embeds `queries` and `passages`, cut as in training.
    pub fn search(self, settings: &Settings, queries: Texts, passages: Texts) -> DevSearch {
        let all = u32::try_from(passages.texts()).unwrap_or(u32::MAX);
        let most = match settings.dev_sample.unwrap_or(SAMPLE) {
            0 => all as usize,
            n => n,
        };
        let mut searched: Vec<u32> = match most >= all as usize {
            true => (0..all).collect(),
            false => self.judged.iter().flat_map(|query| query.grades.iter().map(|&(passage, _)| passage)).collect(),
        };
        searched.sort_unstable();
        searched.dedup();
        if searched.len() < most.min(all as usize) {
            let mut chosen: ahash::HashSet<u32> = searched.iter().copied().collect();
            let mut random = Stream::new(settings.seed, u64::MAX, Site::Passages, 0);
            while chosen.len() < most {
                chosen.insert(random.below(all));
            }
            searched = chosen.into_iter().collect();
            searched.sort_unstable();
        }
        DevSearch { judged: self.judged, queries, passages, searched }
    }

    /// For a cross-encoder, which reranks the run that `settings` name.
    ///
    /// # Errors
    /// A run that cannot be read, or that has none of the judged queries.
    pub fn rerank(self, settings: &Settings, texts: PairTexts) -> Result<DevRerank> {
        let path = settings.dev_run.clone().unwrap_or_default();
        let inputs = source::expand(&[path.to_string_lossy().into_owned()])?;
        let judged: HashMap<u32, usize> = self.judged.iter().enumerate().map(|(i, one)| (one.query, i)).collect();
        let (mut lists, mut seen) = (Vec::new(), 0);
        for input in &inputs {
            let run = Run::read(input, None)?.resolve(input, &self.query_ids, &self.passage_ids)?;
            seen += run.queries.len();
            for (i, &query) in run.queries.iter().enumerate() {
                if let Some(&judged) = judged.get(&query) {
                    lists.push((judged, run.lists.get(i).to_vec()));
                }
            }
        }
        if lists.is_empty() {
            return Err(Error::refused(format!("of its {seen} known queries the dev set judges none"))
                .path(&path)
                .remedy("give a run of --dev-queries over the corpus"));
        }
        if let Some(most) = settings.dev_sample.filter(|&n| n > 0) {
            lists.truncate(most);
        }
        Ok(DevRerank { judged: self.judged, texts, lists })
    }
}

/// A dev set that a bi-encoder searches.
pub struct DevSearch {
    judged: Vec<DevQuery>,
    queries: Texts,
    passages: Texts,
    /// Passages that are searched, ascending.
    searched: Vec<u32>,
}

impl DevSearch {
    /// Passages that are searched.
    pub fn searched(&self) -> usize {
        self.searched.len()
    }
}

/// Embeddings of the texts `numbers`, in their order; none when `go_on` says no.
fn embed(
    model: &mut BiEncoder,
    side: usize,
    texts: &Texts,
    numbers: &[u32],
    go_on: &dyn Fn() -> bool,
) -> Result<Option<Embedded>> {
    let lengths = numbers.iter().map(|&number| texts.length(number)).collect::<Result<Vec<_>>>()?;
    let widths = model.widths();
    let mut all = Embedded::zeros(numbers.len(), widths.0, widths.1);
    for piece in by_length(&lengths, model.limits(side)) {
        if !go_on() {
            return Ok(None);
        }
        let named: Vec<(u64, u32)> = piece.iter().map(|&i| (i as u64, numbers[i])).collect();
        let rows = model.embed(side, &texts.pack(&named)?)?;
        piece.into_iter().enumerate().for_each(|(from, to)| all.set(to, &rows, from, widths));
    }
    Ok(Some(all))
}

impl Judge<BiEncoder> for DevSearch {
    fn judge(&mut self, model: &mut BiEncoder, go_on: &dyn Fn() -> bool) -> Result<Vec<(Metric, f64)>> {
        let (width, k) = model.widths();
        let numbers: Vec<u32> = self.judged.iter().map(|query| query.query).collect();
        let Some(queries) = embed(model, 0, &self.queries, &numbers, go_on)? else { return Ok(Vec::new()) };
        let Some(passages) = embed(model, 1, &self.passages, &self.searched, go_on)? else { return Ok(Vec::new()) };
        let numbers = [&queries.dense, &passages.dense, &queries.weights, &passages.weights];
        if numbers.into_iter().flatten().any(|x| !x.is_finite()) {
            // A model that has diverged finds nothing.
            return Ok(METRICS.map(|metric| (metric, 0.0)).into());
        }
        let lists = if k > 0 {
            let widths = Widths { dim: width, tokens: [k, k], vocabulary: model.config().vocab_size };
            let mut best = Joined::new(&queries, widths, DEPTH);
            best.add(0, &passages);
            best.finish()
        } else {
            let mut best = TopK::new(&queries.dense, width, DEPTH);
            best.add(0, &passages.dense);
            best.finish()
        };
        let figures = self
            .judged
            .iter()
            .zip(&lists)
            .map(|(query, list)| query.figures(list.iter().map(|&(row, _)| self.searched[row as usize])));
        Ok(means(figures.collect::<Vec<_>>().into_iter()))
    }
}

/// A dev set whose run a cross-encoder reranks.
pub struct DevRerank {
    judged: Vec<DevQuery>,
    texts: PairTexts,
    /// Judged query and its passages, best first.
    lists: Vec<(usize, Vec<u32>)>,
}

impl Judge<Ranker> for DevRerank {
    fn judge(&mut self, model: &mut Ranker, go_on: &dyn Fn() -> bool) -> Result<Vec<(Metric, f64)>> {
        let pairs: Vec<(u64, u32, u32)> = self
            .lists
            .iter()
            .flat_map(|(judged, list)| list.iter().map(|&passage| (self.judged[*judged].query, passage)))
            .enumerate()
            .map(|(i, (query, passage))| (i as u64, query, passage))
            .collect();
        let lengths = pairs.iter().map(|&(_, q, p)| self.texts.length(q, p)).collect::<Result<Vec<_>>>()?;
        let mut scores = vec![0.0; pairs.len()];
        for piece in by_length(&lengths, model.limits()) {
            if !go_on() {
                return Ok(Vec::new());
            }
            let named: Vec<_> = piece.iter().map(|&i| pairs[i]).collect();
            let packed = self.texts.pack(&named)?;
            piece.iter().zip(model.scores(&packed)?).for_each(|(&i, score)| scores[i] = score);
        }
        let mut first = 0;
        let figures = self.lists.iter().map(|(judged, list)| {
            let scores = &scores[first..first + list.len()];
            first += list.len();
            let mut order: Vec<usize> = (0..list.len()).collect();
            // Ties stay in the run's order.
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            self.judged[*judged].figures(order.into_iter().map(|i| list[i]))
        });
        Ok(means(figures.collect::<Vec<_>>().into_iter()))
    }
}
