//! What became of many volumes: waited for, and shown as one table.

use std::io;
use std::path::Path;

use serde::Serialize;

use super::add::Waiting;
use super::failure::Failure;
use super::output::{self, Format, VolumeView};
use super::wait::{Goal, wait_all};
use super::{Client, Screen};
use crate::api::v1;

/// A volume of a request, as results show it.
#[derive(Debug, Serialize)]
struct Part {
    name: String,
    /// `add` or `remove`; `prepare` or `move` of a VM that starts or moves.
    wish: &'static str,
    changed: bool,
    volume: Option<VolumeView>,
    error: Option<Failure>,
    #[serde(skip)]
    told: Option<(Goal, v1::Volume)>,
}

impl Part {
    fn new((goal, result): (Goal, v1::VolumeResult)) -> Self {
        let wish = match goal {
            Goal::Ready => "add",
            Goal::Gone => "remove",
        };
        let told = result.volume.clone().map(|volume| (goal, volume));
        Self { told, ..Self::of(wish, result) }
    }

    fn of(wish: &'static str, result: v1::VolumeResult) -> Self {
        let v1::VolumeResult { name, volume, changed, error } = result;
        Self {
            name,
            wish,
            changed,
            volume: volume.as_ref().map(VolumeView::from),
            error: error.as_ref().map(Failure::refused),
            told: None,
        }
    }

    /// What it came to in the end.
    fn ended(&mut self, volume: &v1::Volume, end: Result<(), Failure>) {
        self.volume = Some(VolumeView::from(volume));
        self.error = end.err();
    }

    /// Why it did not come about, with its name.
    fn failure(&self) -> Option<Failure> {
        let error = self.error.as_ref()?;
        let name = if self.name.is_empty() { "(no name)" } else { &self.name };
        Some(Failure { message: format!("{name}: {}", error.message), ..error.clone() })
    }
}

/// Waits for what was taken on, if that is wanted, and shows what became of all. Fails as the first volume
/// does that did not come about.
pub(super) async fn finish(
    results: Vec<(Goal, v1::VolumeResult)>,
    waiting: &Waiting,
    socket: &Path,
    client: Client,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let mut parts: Vec<Part> = results.into_iter().map(Part::new).collect();
    if let Some(patience) = waiting.patience(screen)? {
        let taken: Vec<_> = parts.iter_mut().filter(|part| part.told.is_some()).collect();
        let told = taken.iter().filter_map(|part| part.told.clone()).collect();
        let ended = wait_all(socket, client, told, patience, screen).await?;
        for (part, (volume, end)) in taken.into_iter().zip(ended) {
            part.ended(&volume, end);
        }
    }
    conclude(&parts, format, screen)
}

/// Shows what became of all volumes of a request that does not name them.
pub(super) fn told(
    results: Vec<v1::VolumeResult>,
    wish: &'static str,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let parts: Vec<Part> = results.into_iter().map(|result| Part::of(wish, result)).collect();
    conclude(&parts, format, screen)
}

fn conclude(parts: &[Part], format: Format, screen: &mut Screen<'_>) -> Result<(), Failure> {
    show(parts, format, screen.out)?;
    let failures: Vec<Failure> = parts.iter().filter_map(Part::failure).collect();
    match &failures[..] {
        [] => Ok(()),
        [only] => Err(only.clone()),
        [first, ..] => {
            if format == Format::Table {
                for failure in &failures {
                    failure.write(format, screen.err)?;
                }
            }
            let message =
                format!("{} of {} volumes did not come about", failures.len(), parts.len());
            Err(Failure::plain(first.exit, message))
        }
    }
}

fn show(parts: &[Part], format: Format, to: &mut dyn io::Write) -> io::Result<()> {
    if format != Format::Table {
        return output::document(format, &parts, to);
    }
    let row = |part: &Part| {
        let volume = part.volume.as_ref();
        let device = volume.and_then(|v| v.device.as_ref());
        let trouble = volume.and_then(|v| v.trouble.as_ref()).map(|t| &t.reason);
        let reason = part.error.as_ref().map(|e| &e.reason).or(trouble);
        vec![
            part.name.clone(),
            part.wish.to_owned(),
            if part.changed { "yes" } else { "no" }.to_owned(),
            volume.map(|v| v.phase.to_owned()).unwrap_or_default(),
            volume.map(|v| v.target.clone()).unwrap_or_default(),
            device.map(|d| output::size(d.size_bytes)).unwrap_or_default(),
            device.map(|d| d.paths.to_string()).unwrap_or_default(),
            reason.cloned().unwrap_or_default(),
        ]
    };
    let header = ["VOLUME", "WISH", "CHANGED", "PHASE", "TARGET", "SIZE", "PATHS", "REASON"];
    output::table(&header, parts.iter().map(row).collect(), to)
}
