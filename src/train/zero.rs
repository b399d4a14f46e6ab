//! A loss that is exactly 0: nothing is learned, and the run says why.

use crate::train::StepReport;
use crate::train::settings::{Objective, Settings};

/// One line about a step whose loss, or the part of it that words predict, is exactly 0.
pub fn told(step: u64, report: &StepReport, settings: &Settings) -> Option<String> {
    let part = report.parts.iter().find(|(name, loss)| ["encoder", "decoder"].contains(name) && *loss == 0.0);
    let what = match part {
        Some((name, _)) => format!("the {name} loss"),
        None if report.loss == 0.0 => "the loss".into(),
        None => return None,
    };
    let why = match settings.objective {
        Objective::Retromae | Objective::Dupmae | Objective::Mlm => {
            let data = settings.data.as_deref().unwrap_or_else(|| "DATA".as_ref()).display().to_string();
            format!(
                "no word of the batch was there to predict, as when the tokenizer knows none ([UNK]); \
                 see what the texts became: inspect {data} --masks"
            )
        }
        Objective::Contrastive => {
            "every passage of the batch is a positive of every query, so that there is nothing to tell apart; check \
                                   --qrels, raise --batch-size, or give --negatives"
                .into()
        }
        Objective::CrossEncoder => {
            "the scores of each query's passages leave nothing to tell apart; check --qrels and --negatives".into()
        }
    };
    Some(format!("step {step}: {what} is exactly 0: {why}"))
}
