//! How much arithmetic a training step must do: the number that MFU and TFLOP/s are relative to.

use crate::model::config::BertConfig;
use crate::train::step::Objective;

/// Required floating-point operations of one pre-training step on texts of these lengths: three times the forward; a multiply-add is two.
///
/// Counted are real tokens only: the projections and the feed-forward layer of every layer over all tokens, attention at `4 C L²` a
/// sequence and layer, the MLM head (transform and tied output) on the `masked` rows (for DupMAE on all) and, with a decoder, one more
/// layer and the head on the `labelled` rows. Pairs that the decoder's masks hide are counted. Not counted are embeddings, LayerNorm,
/// softmax, dropout and the optimizer, nor does the count shrink by what the engine saves (the last layer on needed rows, the decoder's
/// queries by parts).
/// So it is the same number for every implementation of the same step.
pub fn pretraining(
    config: &BertConfig,
    objective: Objective,
    lengths: impl IntoIterator<Item = usize>,
    masked: usize,
    labelled: usize,
) -> u64 {
    let [c, v] = [config.hidden_size, config.vocab_size].map(|n| n as u64);
    let head = 2 * c * c + 2 * c * v;
    let lengths: Vec<usize> = lengths.into_iter().collect();
    let tokens: usize = lengths.iter().sum();
    let (layers, rows) = match objective {
        Objective::RetroMae => (config.num_hidden_layers + 1, masked + labelled),
        Objective::DupMae => (config.num_hidden_layers + 1, tokens + labelled),
        Objective::Mlm => (config.num_hidden_layers, masked),
    };
    3 * (layers as u64 * layer(config, lengths) + rows as u64 * head)
}

/// Required floating-point operations of one step of a bi-encoder on queries and passages of these lengths, every passage a candidate of
/// every query: three times the forward.
///
/// Counted as in [`pretraining`]: every layer over real tokens, and `2 C` for each of the B P scores. The embedding is the state of
/// `[CLS]`, without a projection; what is saved by computing the last layer for `[CLS]` only is not taken off.
pub fn fine_tuning(config: &BertConfig, [queries, passages]: [&[usize]; 2]) -> u64 {
    let layer = layer(config, queries.iter().chain(passages).copied());
    let scores = (queries.len() * passages.len()) as u64;
    3 * (config.num_hidden_layers as u64 * layer + 2 * config.hidden_size as u64 * scores)
}

/// The forward of one layer over texts of these lengths.
fn layer(config: &BertConfig, lengths: impl IntoIterator<Item = usize>) -> u64 {
    let (mut tokens, mut squares) = (0, 0);
    for length in lengths {
        tokens += length as u64;
        squares += (length * length) as u64;
    }
    let [c, i] = [config.hidden_size, config.intermediate_size].map(|n| n as u64);
    tokens * (8 * c * c + 4 * c * i) + 4 * c * squares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::presets::preset;

    #[test]
    fn a_model_small_enough_to_count_by_hand() {
        let mut config = preset("bert-tiny").unwrap();
        (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size) = (2, 3, 1, 5);
        // Two texts, of 1 and 2 tokens. A layer: 3 tokens × (4 products of 2 × 2 and 2 of 2 × 3: 28 multiply-adds), and for each text
        // 2 products of L × L × 2: 4 and 16 multiply-adds. A row of the head: 2 × 2 and 2 × 5: 14.
        let (layer, row) = (2 * (3 * 28 + 4 + 16), 2 * 14);
        assert_eq!(pretraining(&config, Objective::Mlm, [1, 2], 2, 9), 3 * (layer + 2 * row));
        assert_eq!(pretraining(&config, Objective::RetroMae, [1, 2], 2, 3), 3 * (2 * layer + 5 * row));
        assert_eq!(pretraining(&config, Objective::DupMae, [1, 2], 2, 3), 3 * (2 * layer + 6 * row));
        // A query and a passage: one score, a product of two rows of 2.
        assert_eq!(fine_tuning(&config, [&[1], &[2]]), 3 * (layer + 4));
    }

    /// 64 × 512 tokens, 154 of each text masked, all but [CLS] and [SEP] labelled for the decoder: what `model_flops` of the PyTorch
    /// baselines gives.
    #[test]
    fn the_same_as_the_pytorch_baselines() {
        let config = preset("bert-base").unwrap();
        let flops = pretraining(&config, Objective::RetroMae, [512; 64], 64 * 154, 64 * 510);
        assert_eq!(flops, 26_227_703_808_000);
        assert_eq!(fine_tuning(&config, [&[12; 64], &[75; 512]]), 20_279_998_808_064);
        // Ragged: the baselines' smallest sets of texts.
        let mut mini = preset("bert-mini").unwrap();
        (mini.hidden_size, mini.intermediate_size, mini.num_hidden_layers, mini.vocab_size) = (128, 256, 2, 1000);
        let passages = [10, 11, 15, 18, 18, 18, 19, 19, 20, 21, 22, 25, 26, 27, 30, 40];
        assert_eq!(fine_tuning(&mini, [&[5, 8, 9, 10], &passages]), 608_971_776);
        let lengths = [10, 11, 13, 15, 15, 18, 18, 18, 18, 19, 19, 20, 20, 21, 22, 22, 24, 25, 26, 27, 30, 30, 31, 40];
        assert_eq!(pretraining(&mini, Objective::RetroMae, lengths, 152, 464), 1_797_055_488);
    }
}
