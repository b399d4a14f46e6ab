//! Every published spelling of a parameter's name.

use crate::golden;
use retromae_engine::model::config::BertConfig;
use retromae_engine::model::names::{self, Meaning, meaning};
use retromae_engine::model::weights::Checkpoint;

#[test]
fn spellings_meet_in_one_name() {
    let param = |name: &str| Meaning::Param(name.to_string());
    let query = "bert.encoder.layer.0.attention.self.query.weight";
    for found in
        ["encoder.layer.0.attention.self.query.weight", query, &format!("lm.{query}"), &format!("module.lm.{query}")]
    {
        assert_eq!(meaning(found), param(query), "{found}");
    }
    assert_eq!(meaning("bert.embeddings.LayerNorm.gamma"), param("bert.embeddings.LayerNorm.weight"));
    assert_eq!(meaning("embeddings.LayerNorm.beta"), param("bert.embeddings.LayerNorm.bias"));
    assert_eq!(
        meaning("lm.cls.predictions.transform.LayerNorm.gamma"),
        param("cls.predictions.transform.LayerNorm.weight")
    );
    assert_eq!(meaning("c_head.output.LayerNorm.gamma"), param("c_head.output.LayerNorm.weight"));
    assert_eq!(meaning("pooler.dense.bias"), param("bert.pooler.dense.bias"));
    assert_eq!(meaning("cls.predictions.decoder.weight"), Meaning::TiedTo(names::WORD_EMBEDDINGS.into()));
    assert_eq!(meaning("lm.cls.predictions.decoder.bias"), Meaning::TiedTo(names::MLM_BIAS.into()));
    let tied = Meaning::TiedTo("bert.embeddings.LayerNorm.weight".into());
    assert_eq!(meaning("decoder_embeddings.LayerNorm.weight"), tied);
    for ignored in ["embeddings.position_ids", "bert.embeddings.position_ids", "cls.seq_relationship.weight"] {
        assert_eq!(meaning(ignored), Meaning::Ignored, "{ignored}");
    }
    assert_eq!(meaning("gpt.wte.weight"), Meaning::Unknown);
}

#[test]
fn the_tables_are_exactly_what_a_checkpoint_holds() {
    let folder = golden("head32/retromae/model");
    let config = BertConfig::read(&folder).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let mut params = names::encoder(&config);
    params.extend(names::mlm_head(&config));
    params.extend(names::enhanced_decoder(&config));
    checkpoint.check(&params).unwrap();
    let mut expected: Vec<&str> = params.iter().map(|p| p.name.as_str()).collect();
    expected.sort_unstable();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), expected);
    assert!(checkpoint.unknown().is_empty());
    assert!(!checkpoint.contains_all(&names::pooler(&config)));
    assert_eq!(names::classifier(&config, 1)[0].shape, [1, 64]);
}
