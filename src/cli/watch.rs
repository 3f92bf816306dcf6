//! `lunplug watch`.

use std::path::Path;

use jiff::Timestamp;

use super::client::connect;
use super::failure::Failure;
use super::output::{self, Format, VolumeView};
use super::{Screen, list};
use crate::api::v1;
use crate::api::v1::watch_volumes_response::Event;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    filter: list::Args,
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let request = v1::WatchVolumesRequest { vm: args.filter.filter()? };
    let mut client = connect(socket).await?;
    let mut stream = client.watch_volumes(request).await?.into_inner();
    while let Some(message) = stream.message().await? {
        match message.event {
            Some(Event::Snapshot(snapshot)) => {
                if snapshot.events_lost {
                    writeln!(screen.err, "some changes were lost; this is how it is now")?;
                }
                for volume in snapshot.volumes.iter().filter(|v| args.filter.wants(v)) {
                    show(format, volume, screen)?;
                }
            }
            Some(Event::Changed(volume)) if args.filter.wants(&volume) => {
                show(format, &volume, screen)?;
            }
            Some(Event::Changed(_)) | None => {}
        }
    }
    Ok(())
}

fn show(format: Format, volume: &v1::Volume, screen: &mut Screen<'_>) -> Result<(), Failure> {
    let view = VolumeView::from(volume);
    if format != Format::Table {
        output::document(format, &view, screen.out)?;
    } else {
        let at = view.since.unwrap_or_else(Timestamp::now);
        let mut line = format!("{at:.3}  {}/{}  {}", view.vm, view.name, view.phase);
        if let Some(trouble) = view.trouble {
            line += &format!("  {}: {}", trouble.reason, trouble.message);
        }
        if view.phase == "Gone" && !view.gave_up.is_empty() {
            line += &format!("  gave up: {}", view.gave_up.join("; "));
        }
        writeln!(screen.out, "{}", output::clean(&line))?;
    }
    Ok(screen.out.flush()?)
}
