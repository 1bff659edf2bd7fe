# SPDX-License-Identifier: GPL-2.0
#
# Draws instructions per page against vCPUs for each kind of memory, which are the blocks
# of the file "points", a line for 1, 4 and 16 vCPUs, a column for each way. Colours are those of Okabe
# and Ito, which those who see fewer colours can tell apart, too.

font = "DejaVu Sans,14"
if (format eq "svg") {
	set terminal svg size 1500,900 font font background "white"
} else {
	set terminal pngcairo size 1500,900 font font background "white"
}
set output output

set style line 1 lc rgb "#000000" lw 2.5 pt 7 ps 1.2
set style line 2 lc rgb "#E69F00" lw 2.5 pt 7 ps 1.2
set style line 3 lc rgb "#D55E00" lw 2.5 pt 7 ps 1.2
set style line 4 lc rgb "#0072B2" lw 2.5 pt 7 ps 1.2
set style line 9 lc rgb "#dddddd" lw 1
set border 3
set tics nomirror out
set grid ytics ls 9
set yrange [0:*]
set xrange [0.5:3.5]
set xtics ("1 vCPU" 1, "4" 2, "16" 3)
set format y "%'.0f"

titles = "'MISSING, anonymous' 'MISSING, shmem' 'MISSING, 2M pages of hugetlb' 'MINOR, shmem' 'MINOR, 2M pages of hugetlb'"
ways = "kernel uffd1 uffd exits"
names = "'kernel alone' 'userfaultfd, one' 'userfaultfd, one a vCPU' 'exits'"

set multiplot layout 2,3 title "Instructions per page, ".arch.", one emulated CPU" font "DejaVu Sans,18"
set key off
do for [m = 1:words(titles)] {
	set title word(titles, m) font "DejaVu Sans,15"
	plot for [w = 1:words(ways)] points index (m - 1) using 1:(column(w + 1)) \
		with linespoints ls w
}
unset border
unset tics
unset title
set yrange [0:1]
set key center center font "DejaVu Sans,16" spacing 1.6
plot for [w = 1:words(ways)] -1 with linespoints ls w title word(names, w)
