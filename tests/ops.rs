//! Every op against central differences in f64, its f32 form against its f64 form, what it writes and what it adds to, and equal
//! bits whatever the number of threads.

#[path = "ops/activation.rs"]
mod activation;
#[path = "ops/attention.rs"]
mod attention;
#[path = "ops/bag_of_words.rs"]
mod bag_of_words;
#[path = "ops/common.rs"]
mod common;
#[path = "ops/contrastive.rs"]
mod contrastive;
#[path = "ops/cross_entropy.rs"]
mod cross_entropy;
#[path = "ops/dropout.rs"]
mod dropout;
#[path = "ops/embed.rs"]
mod embed;
#[path = "ops/enhanced_decoding.rs"]
mod enhanced_decoding;
#[path = "ops/gather.rs"]
mod gather;
#[path = "ops/group_loss.rs"]
mod group_loss;
#[path = "ops/group_scores.rs"]
mod group_scores;
#[path = "ops/joined.rs"]
mod joined;
#[path = "ops/layernorm.rs"]
mod layernorm;
#[path = "ops/lexical.rs"]
mod lexical;
#[path = "ops/linear.rs"]
mod linear;
#[path = "ops/optimizer.rs"]
mod optimizer;
#[path = "ops/pool.rs"]
mod pool;
#[path = "ops/topk.rs"]
mod topk;
