#!/usr/bin/perl
# A hash that grows, strings that are rewritten, signals that come all the while, until the
# file `go` is there (or for $STEPS steps).
use strict;
use warnings;
use Digest::MD5 qw(md5_hex);
use Time::HiRes qw(setitimer ITIMER_REAL);
my $steps = $ENV{STEPS} // 0;
my ($alarms, $count, $sum) = (0, 0, '');
my (%seen, @list);
$SIG{ALRM} = sub { $alarms++ };
setitimer(ITIMER_REAL, 0.005, 0.005);
open my $progress, '>', 'progress' or die "progress: $!";
$progress->autoflush(1);
while ($steps ? $count != $steps : !-e 'go') {
    $count++;
    for my $i (1 .. 30) {
        my $key = "$count-$i";
        $seen{$key} = $key x 20;
        push @list, $key;
    }
    my $old = $list[$count * 7919 % @list];
    die "$old is $seen{$old}" if $seen{$old} ne $old x 20;
    $sum = md5_hex($sum . $seen{$old} . join ',', sort @list[-30 .. -1]);
    print $progress "$count $sum\n" if $count % 5 == 0;
    # An alarm may cut it short; the time does not matter.
    select undef, undef, undef, 0.002;
}
for my $key (@list) {
    die "$key is $seen{$key}" if $seen{$key} ne $key x 20;
}
# The timer still runs: one more alarm comes.
my $then = $alarms;
select undef, undef, undef, 0.01 while $alarms == $then;
# Nobody catches it in the end.
setitimer(ITIMER_REAL, 0);
open my $out, '>', 'out' or die "out: $!";
print $out scalar(@list), ' ', scalar(keys %seen), " $sum\n";
close $out or die "out: $!";
open $out, '>', 'count' or die "count: $!";
print $out "$count\n";
close $out or die "count: $!";
