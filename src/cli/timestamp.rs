//! Moments as names of files: 20261121T223000Z.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Basic form of ISO 8601, UTC: sorts as time goes, and needs no quoting.
pub fn name(t: SystemTime) -> String {
    let (y, m, d, s) = parts(t);
    format!(
        "{y:04}{m:02}{d:02}T{:02}{:02}{:02}Z",
        s / 3600,
        s / 60 % 60,
        s % 60
    )
}

/// "2026-11-21 22:30:00 UTC", from nanoseconds since the epoch.
pub fn shown(realtime_ns: i128) -> String {
    let ns = u64::try_from(realtime_ns).unwrap_or(0);
    let (y, m, d, s) = parts(UNIX_EPOCH + Duration::from_nanos(ns));
    format!(
        "{y:04}-{m:02}-{d:02} {:02}:{:02}:{:02} UTC",
        s / 3600,
        s / 60 % 60,
        s % 60
    )
}

/// Year, month, day and second of the day, UTC (days to dates in the Gregorian calendar, with years that
/// begin in March so that the leap day is the last).
fn parts(t: SystemTime) -> (u64, u64, u64, u64) {
    let secs = t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let days = secs / 86400 + 719_468; // since 0000-03-01
    let era = days / 146_097;
    let doe = days % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    (year, month, day, secs % 86400)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> String {
        name(UNIX_EPOCH + Duration::from_secs(secs))
    }

    #[test]
    fn dates_are_right_around_leap_days_and_years() {
        assert_eq!(at(0), "19700101T000000Z");
        assert_eq!(at(951_782_400), "20000229T000000Z");
        assert_eq!(at(951_868_800), "20000301T000000Z");
        assert_eq!(at(1_798_761_599), "20261231T235959Z");
        assert_eq!(at(4_107_542_400), "21000301T000000Z");
    }
}
