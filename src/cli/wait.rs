//! Waiting until a volume is where it was asked to be, with its phases shown as they come.
//!
//! A reason that goes away by itself keeps the wait going; one that somebody has to act on ends it.
//! lunplugd goes on either way: ending the wait cancels nothing.

use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, timeout_at};

use super::client::{Client, connect};
use super::failure::{Exit, Failure};
use super::{Screen, output};
use crate::api::v1;
use crate::api::v1::watch_volumes_response::Event;
use crate::reason::Reason;

/// Between two tries to reach a daemon that is being restarted.
const RECONNECT: Duration = Duration::from_millis(500);

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// The guest has it.
    Ready,
    /// Nothing of it is left.
    Gone,
}

/// What one look at the volume means.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Wait,
    Reached,
    Failed(Failure),
}

/// Judges a volume's state; `None` when there is no such volume.
fn judge(goal: Goal, volume: Option<&v1::Volume>) -> Verdict {
    use v1::Phase as P;
    let Some(volume) = volume else {
        return match goal {
            Goal::Gone => Verdict::Reached,
            Goal::Ready => called_off(),
        };
    };
    match (goal, volume.phase()) {
        (Goal::Ready, P::Ready) | (Goal::Gone, P::Gone) => Verdict::Reached,
        (Goal::Ready, P::Detaching | P::UnmountedFromPod | P::Gone) => called_off(),
        _ => match &volume.trouble {
            Some(trouble) if !trouble.transient => Verdict::Failed(Failure::trouble(trouble)),
            _ => Verdict::Wait,
        },
    }
}

fn called_off() -> Verdict {
    let message = "the volume was removed while it was being added";
    Verdict::Failed(Failure::of(Reason::Cancelled, message))
}

/// Follows `volume` from the state the daemon answered with until the goal is reached, it fails, or
/// the time is over. Returns its last state.
pub(super) async fn wait(
    socket: &Path,
    mut client: Client,
    goal: Goal,
    volume: v1::Volume,
    patience: Duration,
    screen: &mut Screen<'_>,
) -> Result<v1::Volume, Failure> {
    let mut shown = Shown::new(screen);
    let deadline = Instant::now() + patience;
    let mut wait = Wait { goal, floor: volume.generation, last: volume };
    shown.volume(&wait.last)?;
    let followed = async {
        loop {
            if let Some(end) = wait.follow(&mut client, &mut shown).await? {
                return end;
            }
            // The daemon is being restarted. It goes on with what it had, so the wait does too;
            // whether it counts on from where it was is its own affair.
            wait.floor = 0;
            shown.note("lunplugd went away; waiting for it")?;
            client = loop {
                tokio::time::sleep(RECONNECT).await;
                if let Ok(client) = connect(socket).await {
                    break client;
                }
            };
        }
    };
    let ended = timeout_at(deadline, followed).await;
    shown.done();
    match ended {
        Ok(Ok(())) => Ok(wait.last),
        Ok(Err(failure)) => Err(failure),
        Err(_) => Err(too_late(&wait.last, patience)),
    }
}

fn too_late(volume: &v1::Volume, patience: Duration) -> Failure {
    let phase = output::phase(volume.phase());
    let why = match &volume.trouble {
        Some(trouble) => format!(" ({}: {})", trouble.reason, trouble.message),
        None => String::new(),
    };
    let message = format!("still {phase} after {}s{why}", patience.as_secs());
    let remedy = "lunplugd goes on with it: follow it with lunplug watch, or give --timeout.";
    Failure {
        exit: Exit::Unavailable,
        remedy: remedy.into(),
        ..Failure::of(Reason::DeadlineExceeded, message)
    }
}

struct Wait {
    goal: Goal,
    /// States of lower generations are older than the daemon's answer.
    floor: u64,
    last: v1::Volume,
}

impl Wait {
    /// Follows one stream: `None` when the daemon went away.
    async fn follow(
        &mut self,
        client: &mut Client,
        shown: &mut Shown<'_, '_>,
    ) -> Result<Option<Result<(), Failure>>, Failure> {
        let request = v1::WatchVolumesRequest { vm: self.last.vm.clone() };
        let mut stream = match client.watch_volumes(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => {
                let failure = Failure::from(status.clone());
                if self.goal == Goal::Gone && failure.reason == Reason::VmNotFound.code() {
                    // The whole VM was forgotten meanwhile, which takes that its volumes are gone.
                    self.look(None, shown)?;
                    return Ok(Some(Ok(())));
                }
                return gone_or_failed(status);
            }
        };
        loop {
            let event = match stream.message().await {
                Ok(Some(message)) => message.event,
                Ok(None) => return Ok(None),
                Err(status) => return gone_or_failed(status),
            };
            let verdict = match event {
                Some(Event::Snapshot(snapshot)) => {
                    let found = snapshot.volumes.into_iter().find(|v| self.is_ours(v));
                    self.look(found, shown)?
                }
                Some(Event::Changed(volume)) if self.is_ours(&volume) => {
                    self.look(Some(volume), shown)?
                }
                Some(Event::Changed(_)) | None => Verdict::Wait,
            };
            match verdict {
                Verdict::Wait => {}
                Verdict::Reached => return Ok(Some(Ok(()))),
                Verdict::Failed(failure) => return Ok(Some(Err(failure))),
            }
        }
    }

    fn is_ours(&self, volume: &v1::Volume) -> bool {
        let name = |v: &v1::Volume| v.spec.as_ref().map(|spec| spec.name.clone());
        volume.vm == self.last.vm && name(volume) == name(&self.last)
    }

    fn look(
        &mut self,
        found: Option<v1::Volume>,
        shown: &mut Shown<'_, '_>,
    ) -> Result<Verdict, Failure> {
        match found {
            Some(volume) if volume.generation < self.floor => return Ok(Verdict::Wait),
            Some(volume) => self.last = volume,
            None => {
                let verdict = judge(self.goal, None);
                self.last.set_phase(v1::Phase::Gone);
                self.last.trouble = None;
                shown.volume(&self.last)?;
                return Ok(verdict);
            }
        }
        shown.volume(&self.last)?;
        Ok(judge(self.goal, Some(&self.last)))
    }
}

fn gone_or_failed<T>(status: tonic::Status) -> Result<Option<T>, Failure> {
    // A broken connection shows as Unknown or Cancelled as well, without our details.
    let failure = Failure::from(status);
    let gone = failure.exit == Exit::Unavailable
        || (failure.reason.is_empty() && matches!(failure.exit, Exit::Failed | Exit::Cancelled));
    if gone { Ok(None) } else { Err(failure) }
}

/// The phases as they come, with their times: lines, and below them, for a person, what goes on.
struct Shown<'a, 'b> {
    screen: &'a mut Screen<'b>,
    spinner: Option<ProgressBar>,
    start: Instant,
    last: Option<(v1::Phase, String)>,
    /// How much of what was given up was told.
    gave_up: usize,
}

impl<'a, 'b> Shown<'a, 'b> {
    fn new(screen: &'a mut Screen<'b>) -> Self {
        let spinner = screen.live.then(|| {
            let style = ProgressStyle::with_template("{spinner} {elapsed} {msg}")
                .expect("the template is a constant");
            let spinner = ProgressBar::new_spinner().with_style(style);
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        });
        Self { screen, spinner, start: Instant::now(), last: None, gave_up: 0 }
    }

    /// Shows a phase or a reason that is new.
    fn volume(&mut self, volume: &v1::Volume) -> Result<(), Failure> {
        for what in volume.gave_up.iter().skip(self.gave_up) {
            self.note(&format!("gave up: {what}"))?;
        }
        self.gave_up = self.gave_up.max(volume.gave_up.len());
        let reason = volume.trouble.as_ref().map(|t| t.reason.clone()).unwrap_or_default();
        let now = (volume.phase(), reason);
        if self.last.as_ref() == Some(&now) {
            return Ok(());
        }
        self.last = Some(now);
        let mut line = output::phase(volume.phase()).to_owned();
        if let Some(device) = volume.device.as_ref().filter(|_| volume.trouble.is_none()) {
            let size = output::size(device.size_bytes);
            line =
                format!("{line}  {} {} {size}, paths: {}", device.dev, device.wwid, device.paths);
        }
        if let Some(trouble) = &volume.trouble {
            line = format!("{line}  {}: {}", trouble.reason, trouble.message);
        }
        self.note(&line)
    }

    fn note(&mut self, text: &str) -> Result<(), Failure> {
        let text = output::clean(text);
        let line = format!("{:>8.2}s  {text}", self.start.elapsed().as_secs_f64());
        match &self.spinner {
            Some(spinner) => {
                spinner.println(line);
                spinner.set_message(text);
            }
            None => writeln!(self.screen.err, "{line}")?,
        }
        Ok(())
    }

    fn done(self) {
        if let Some(spinner) = self.spinner {
            spinner.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(phase: v1::Phase, trouble: Option<Reason>) -> v1::Volume {
        let mut volume = v1::Volume::default();
        volume.set_phase(phase);
        volume.trouble = trouble.map(|reason| v1::Trouble {
            reason: reason.code().into(),
            transient: reason.is_transient(),
            ..v1::Trouble::default()
        });
        volume
    }

    #[test]
    fn only_what_somebody_has_to_act_on_ends_a_wait_early() {
        use v1::Phase as P;
        let exit = |goal, volume: Option<v1::Volume>| match judge(goal, volume.as_ref()) {
            Verdict::Wait => None,
            Verdict::Reached => Some(Exit::Ok),
            Verdict::Failed(failure) => Some(failure.exit),
        };
        let (slow, refused) = (Some(Reason::PortalUnreachable), Some(Reason::LoginRefused));
        for (goal, volume, expected) in [
            (Goal::Ready, Some(volume(P::Pending, None)), None),
            (Goal::Ready, Some(volume(P::Pending, slow)), None),
            (Goal::Ready, Some(volume(P::Pending, refused)), Some(Exit::Precondition)),
            (Goal::Ready, Some(volume(P::Ready, None)), Some(Exit::Ok)),
            (Goal::Ready, Some(volume(P::Detaching, None)), Some(Exit::Cancelled)),
            (Goal::Ready, None, Some(Exit::Cancelled)),
            (Goal::Gone, Some(volume(P::Ready, None)), None),
            (Goal::Gone, Some(volume(P::Detaching, Some(Reason::DetachUnacknowledged))), None),
            (
                Goal::Gone,
                Some(volume(P::Detaching, Some(Reason::InUseByGuest))),
                Some(Exit::Precondition),
            ),
            (Goal::Gone, Some(volume(P::Gone, Some(Reason::GuestUnproven))), Some(Exit::Ok)),
            (Goal::Gone, None, Some(Exit::Ok)),
        ] {
            assert_eq!(exit(goal, volume.clone()), expected, "{goal:?} {volume:?}");
        }
    }
}
