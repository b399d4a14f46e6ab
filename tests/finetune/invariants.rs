//! What must hold of fine-tuning on any batch.
