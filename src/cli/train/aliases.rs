//! The spellings of the Hugging Face `Trainer` and of the published RetroMAE scripts that `train` also takes. They do not appear in
//! the help; this table is their one place.

/// Alias and the flag it stands for. All take the same value as the flag.
pub const ALIASES: &[(&str, &str)] = &[
    // RetroMAE, `pretrain.run` (arguments.py)
    ("data_dir", "data"),
    ("train_data_dir", "data"),
    ("encoder_mlm_probability", "encoder_mask_probability"),
    ("decoder_mlm_probability", "decoder_mask_probability"),
    ("mlm_probability", "encoder_mask_probability"),
    ("pretrain_method", "objective"),
    ("model_name_or_path", "model"),
    ("max_seq_length", "max_length"),
    ("max_length", "max_length"),
    // RetroMAE, `bi_encoder.run` and `cross_encoder.run` (arguments.py)
    ("corpus_file", "corpus"),
    ("train_query_file", "queries"),
    ("train_qrels", "qrels"),
    ("neg_file", "negatives"),
    ("teacher_score_files", "teacher_scores"),
    ("train_group_size", "group_size"),
    ("sample_neg_from_topk", "negatives_depth"),
    ("query_max_len", "query_length"),
    ("passage_max_len", "passage_length"),
    ("max_len", "max_length"),
    ("sentence_pooling_method", "pooling"),
    ("normlized", "normalize"),
    ("untie_encoder", "untied"),
    ("projection_out_dim", "projection"),
    ("contrastive_loss_weight", "contrastive_loss_weight"),
    ("tokenizer_name", "tokenizer"),
    // transformers.TrainingArguments, of evaluation
    ("metric_for_best_model", "best_metric"),
    ("load_best_model_at_end", "keep_best"),
    ("early_stopping_patience", "patience"),
    // transformers.TrainingArguments
    ("config_name", "config_name"),
    ("output_dir", "output"),
    ("per_device_train_batch_size", "batch_size"),
    ("batch_size", "batch_size"),
    ("gradient_accumulation_steps", "accumulate"),
    ("num_train_epochs", "epochs"),
    ("max_steps", "steps"),
    ("learning_rate", "learning_rate"),
    ("lr_scheduler_type", "schedule"),
    ("warmup_ratio", "warmup_ratio"),
    ("warmup_steps", "warmup_steps"),
    ("weight_decay", "weight_decay"),
    ("max_grad_norm", "clip"),
    ("adam_beta1", "beta1"),
    ("adam_beta2", "beta2"),
    ("adam_epsilon", "epsilon"),
    ("save_steps", "save_every"),
    ("save_total_limit", "keep"),
    ("logging_steps", "log_every"),
    ("eval_steps", "eval_every"),
    ("resume_from_checkpoint", "resume"),
    ("gradient-accumulation-steps", "accumulate"),
    ("max-grad-norm", "clip"),
    ("max-steps", "steps"),
    ("output-dir", "output"),
    ("num-train-epochs", "epochs"),
    ("per-device-train-batch-size", "batch_size"),
    ("lr", "learning_rate"),
];

/// Flags of those scripts that change nothing here, and why. They are taken with or without a value.
pub const IGNORED: &[(&str, &str)] = &[
    ("negatives_x_device", "one process trains, and its batch is all there is"),
    ("add_pooler", "the width given with --projection_out_dim says it"),
    ("projection_in_dim", "it is the width of the model"),
    ("do_train", "training is what `train` does"),
    ("fp16", "precision follows the device, see --precision"),
    ("bf16", "precision follows the device, see --precision"),
    ("dataloader_num_workers", "batches are built ahead by threads of the process"),
    ("dataloader_drop_last", "an epoch ends exactly where the data does"),
    ("report_to", "metrics.jsonl and TensorBoard events are always written"),
];

/// Adds both tables to the command.
pub fn add(command: clap::Command) -> clap::Command {
    let command =
        ALIASES.iter().fold(command, |command, (alias, flag)| command.mut_arg(*flag, |arg| arg.alias(*alias)));
    IGNORED.iter().fold(command, |command, (name, _)| {
        command.arg(clap::Arg::new(*name).long(*name).hide(true).num_args(0..=1).action(clap::ArgAction::Append))
    })
}

/// One line for each ignored flag that was given.
pub fn notes(matches: &clap::ArgMatches) -> Vec<String> {
    let given =
        IGNORED.iter().filter(|(name, _)| matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine));
    given.map(|(name, why)| format!("--{name} changes nothing: {why}")).collect()
}
