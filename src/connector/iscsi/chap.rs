//! CHAP: credentials in records of ours, and whose credentials a session was made with.
//!
//! A session is one for a target, a portal and an initiator, whoever uses it. So whoever comes first
//! decides its credentials; a volume that has others is refused, for it might not get in by itself.
//! Sessions and records of others are used as they are.
//!
//! iscsid keeps the credentials of a session in memory, and reads them from the record when it starts
//! over a session that is there. The kernel shows them to root beside the session
//! (drivers/scsi/scsi_transport_iscsi.c, `iscsi_session_attr(password...)`).

use std::collections::BTreeSet;

use zeroize::Zeroizing;

use super::login::Made;
use super::noderecords::is_by;
use super::session::Session;
use super::{Inner, Job};
use crate::connector::error::Error;
use crate::types::{Chap, Portal, SecretText};

/// What the kernel shows of a session that has no name or secret.
const NOTHING: [&str; 3] = ["", "(null)", "<NULL>"];

impl Inner {
    /// For a job without credentials: removes records of ours that have somebody's, so that they are
    /// made anew. What they had of the host's configuration cannot be told from their text.
    pub(super) async fn without_chap(
        &self,
        job: &Job,
        made: &Made,
        ours: &BTreeSet<Portal>,
        mut missing: Vec<Portal>,
        need: &[Portal],
    ) -> Result<Vec<Portal>, Error> {
        let target = &job.source.target;
        let stale = |p: &&Portal| ours.contains(p) && made.chap.contains(p);
        for &portal in need.iter().filter(stale).filter(|_| job.with.chap.is_none()) {
            if !missing.contains(&portal) {
                for record in self.known_records(target).await? {
                    if record.portal == portal && is_by(&record, target) {
                        self.remove_record(target, &record).await?;
                    }
                }
                missing.push(portal);
            }
            let forget = |made: &mut Made| made.chap.remove(&portal);
            self.leases.update_made(target.as_str(), forget).await?;
        }
        Ok(missing)
    }

    /// Refuses a session of ours that was made with other credentials than the job's.
    pub(super) async fn refuse_other_chap(
        &self,
        job: &Job,
        session: &Session,
    ) -> Result<(), Error> {
        let target = &job.source.target;
        let made: Made = self.leases.made(target.as_str()).await?;
        if !session.marked || !session.is_by(target) {
            return Ok(());
        }
        let same = match &job.with.chap {
            Some(chap) => self.is_by(session, chap).await?,
            None => !made.chap.contains(&session.portal),
        };
        if same {
            return Ok(());
        }
        let portal = session.portal.to_string();
        Err(Error::ChapDiffers { target: target.to_string(), portal })
    }

    /// Whether a session was made with exactly these credentials.
    async fn is_by(&self, session: &Session, chap: &Chap) -> Result<bool, Error> {
        let shown = async |name: &str| -> Result<SecretText, Error> {
            let path = format!("class/iscsi_session/session{}/{name}", session.sid);
            let read = self.doors.sysfs.read(&path).await.map(Zeroizing::new);
            let bytes = read.map_err(Error::io(format!("reading {path}")))?;
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim();
            Ok(SecretText::from(if NOTHING.contains(&text) { "" } else { text }.to_owned()))
        };
        let back = chap.back.as_ref();
        let none = SecretText::default();
        Ok(shown("username").await?.expose() == chap.out.name
            && shown("password").await? == chap.out.secret
            && shown("username_in").await?.expose() == back.map_or("", |b| b.name.as_str())
            && shown("password_in").await? == *back.map_or(&none, |b| &b.secret))
    }
}
